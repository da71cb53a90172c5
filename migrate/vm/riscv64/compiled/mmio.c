/* Devices: accesses to their windows become calls of Python functions. */
#include "mmio.h"
#include "callback.h"
#include "methods.h"

typedef struct {
    Engine *engine;
    PyObject *read, *write;
} Window;

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *user)
{
    Window *window = user;
    Engine *self = window->engine;
    uint64_t value = 0;
    (void)uc;
    if (!self->running)
        return 0;
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

PyObject *engine_map_mmio(Engine *self, PyObject *args)
{
    unsigned long long gpa, size;
    PyObject *read, *write;
    if (!PyArg_ParseTuple(args, "KKOO", &gpa, &size, &read, &write))
        return NULL;
    Window *window = PyMem_Malloc(sizeof *window);
    if (!window)
        return PyErr_NoMemory();
    *window = (Window){self, Py_NewRef(read), Py_NewRef(write)};
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
    return PyLong_FromLong(error);
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
