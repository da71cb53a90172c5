/*
 * Devices: accesses to their windows become calls of Python functions, which need the GIL. Beside a
 * busy thread of the same process that costs a change of threads each time, so a window has
 * shortcuts for what guests do all the time: reading the time, asking whether a transmitter is
 * ready, transmitting. Which register means what is the device's business.
 */
#include "mmio.h"
#include "callback.h"
#include "methods.h"

#define SINK_BYTES 1024
#define NOWHERE UINT64_MAX

typedef struct {
    Engine *engine;
    PyObject *read, *write;
    uint64_t time_offset;   /* eight bytes here read as guest time */
    uint64_t latched_at;    /* `executed` when the low half of the time was read... */
    uint64_t latched;       /* ...and what it was: the engine splits reads of eight bytes */
    uint64_t shadow_offset; /* the byte here reads as `shadow` */
    uint8_t shadow;
    uint64_t sink_offset; /* bytes written here are collected */
    size_t collected;
    uint8_t sink[SINK_BYTES];
} Window;

static bool shortcut_read(Window *window, uint64_t offset, unsigned size, uint64_t *value)
{
    Engine *self = window->engine;
    if (offset == window->shadow_offset && size == 1) {
        *value = window->shadow;
        return true;
    }
    uint64_t part = offset - window->time_offset;
    if (window->time_offset == NOWHERE || part >= 8 || size < 4)
        return false;
    if (part == 4 && size == 4 && window->latched_at == self->executed) {
        *value = window->latched >> 32;
        window->latched_at = NOWHERE;
        return true;
    }
    uint64_t ticks = guest_ticks(self);
    if (part == 0 && size == 4) {
        window->latched = ticks;
        window->latched_at = self->executed;
    }
    *value = size == 4 ? (uint32_t)(ticks >> part * 8) : ticks;
    return part % size == 0;
}

static bool shortcut_write(Window *window, uint64_t offset, unsigned size, uint64_t value)
{
    if (offset != window->sink_offset || size != 1 || window->collected == SINK_BYTES)
        return false;
    window->sink[window->collected++] = (uint8_t)value;
    /* A line that is whole should be seen. Executed time has no now: there the turn's end will do,
     * so that where output is collected does not move turns. */
    if (value == '\n' && window->engine->time_kind == TIME_REAL)
        ask(window->engine, ASK_TURN);
    return true;
}

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *user)
{
    Window *window = user;
    Engine *self = window->engine;
    uint64_t value = 0;
    (void)uc;
    if (!self->running)
        return 0;
    if (shortcut_read(window, offset, size, &value))
        return value;
    gil_take(self);
    PyObject *result = PyObject_CallFunction(window->read, "KI", (unsigned long long)offset, size);
    if (result) {
        value = PyLong_AsUnsignedLongLongMask(result);
        Py_DECREF(result);
    }
    if (PyErr_Occurred())
        take_python_error(self);
    gil_drop(self);
    return size < 8 ? value & ((1ull << size * 8) - 1) : value;
}

static void on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user)
{
    Window *window = user;
    Engine *self = window->engine;
    (void)uc;
    if (!self->running)
        return;
    if (size < 8)
        value &= (1ull << size * 8) - 1;
    if (shortcut_write(window, offset, size, value))
        return;
    gil_take(self);
    PyObject *result = PyObject_CallFunction(window->write, "KIK", (unsigned long long)offset, size,
                                             (unsigned long long)value);
    if (result)
        Py_DECREF(result);
    else
        take_python_error(self);
    gil_drop(self);
    if (self->async_stop)
        uc_api.uc_emu_stop(self->uc);
}

static void free_window(PyObject *capsule)
{
    Window *window = PyCapsule_GetPointer(capsule, "window");
    Py_XDECREF(window->read);
    Py_XDECREF(window->write);
    PyMem_Free(window);
}

/* map_mmio(gpa, size, read, write) -> number of the window, or the engine's error, negative */
PyObject *engine_map_mmio(Engine *self, PyObject *args)
{
    unsigned long long gpa, size;
    PyObject *read, *write;
    if (!PyArg_ParseTuple(args, "KKOO", &gpa, &size, &read, &write))
        return NULL;
    Window *window = PyMem_Malloc(sizeof *window);
    if (!window)
        return PyErr_NoMemory();
    window->engine = self;
    window->read = Py_NewRef(read);
    window->write = Py_NewRef(write);
    window->time_offset = window->latched_at = NOWHERE;
    window->shadow_offset = window->sink_offset = NOWHERE;
    window->collected = 0;
    PyObject *capsule = PyCapsule_New(window, "window", free_window);
    if (!capsule) {
        PyMem_Free(window);
        return NULL;
    }
    int failed = PyList_Append(self->devices, capsule);
    Py_DECREF(capsule);
    if (failed)
        return NULL;
    int error = uc_api.uc_mmio_map(self->uc, gpa, size, on_mmio_read, window, on_mmio_write, window);
    return PyLong_FromSsize_t(error ? -(Py_ssize_t)error : PyList_GET_SIZE(self->devices) - 1);
}

static Window *window_of(Engine *self, Py_ssize_t number)
{
    if (self->devices && number >= 0 && number < PyList_GET_SIZE(self->devices))
        return PyCapsule_GetPointer(PyList_GET_ITEM(self->devices, number), "window");
    PyErr_Format(PyExc_IndexError, "no window %zd", number);
    return NULL;
}

/* window_shortcut(number, kind, offset, value): 't'ime at offset, 's'hadow of value, s'i'nk;
 * offset -1 takes the shortcut away */
PyObject *engine_window_shortcut(Engine *self, PyObject *args)
{
    Py_ssize_t number;
    char kind;
    int value;
    long long offset;
    if (!PyArg_ParseTuple(args, "ncLi", &number, &kind, &offset, &value))
        return NULL;
    Window *window = window_of(self, number);
    if (!window)
        return NULL;
    uint64_t at = offset < 0 ? NOWHERE : (uint64_t)offset;
    if (kind == 't') {
        window->time_offset = at;
    } else if (kind == 's') {
        window->shadow = (uint8_t)value;
        window->shadow_offset = at;
    } else {
        window->sink_offset = at;
    }
    Py_RETURN_NONE;
}

/* window_drain(number) -> the bytes collected since the last call */
PyObject *engine_window_drain(Engine *self, PyObject *args)
{
    Py_ssize_t number;
    if (!PyArg_ParseTuple(args, "n", &number))
        return NULL;
    Window *window = window_of(self, number);
    if (!window)
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize((char *)window->sink, (Py_ssize_t)window->collected);
    if (bytes)
        window->collected = 0;
    return bytes;
}

int visit_windows(PyObject *devices, visitproc visit, void *arg)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(devices); i++) {
        Window *window = PyCapsule_GetPointer(PyList_GET_ITEM(devices, i), "window");
        Py_VISIT(window->read);
        Py_VISIT(window->write);
    }
    return 0;
}
