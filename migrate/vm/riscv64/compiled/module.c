/*
 * The compiled part of the RISC-V core: what must happen inside the engine, without the GIL. This
 * file is the Python type; beside it lie
 *
 *   run.c          the run loop and its exact stops at boundaries of translated blocks
 *   traps.c        delivery of exceptions; decode.c: what the trapping instruction wanted
 *   csrs.c         time, counters, PMP
 *   harts.c        several harts in the engine's one environment
 *   memory.c       guest memory, precise faults of stores beside it; mmio.c: devices
 *   code_repair.c  two functions of the engine that leave translated code stale
 *   unicorn_api.c  the engine's functions; environment.h: its layout
 *
 * It knows no device, no board and no file.
 */
#include "code_repair.h"
#include "csrs.h"
#include "engine.h"
#include "memory.h"
#include "methods.h"
#include "mmio.h"
#include "run.h"
#include "traps.h"

#define FIRST_CHUNK 16384 /* of code, between two looks at the clock; adapts */

Engine *engines;

static int engine_init(Engine *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"uc", "harts", "ecall", NULL};
    PyObject *handle, *ecall;
    int n_harts;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OiO", names, &handle, &n_harts, &ecall))
        return -1;
    if (!api_ready || self->uc || n_harts < 1 || n_harts > 4096) {
        PyErr_SetString(PyExc_RuntimeError, "bind first; an engine is made once, of 1..4096 harts");
        return -1;
    }
    void *uc = PyLong_AsVoidPtr(handle);
    if (!uc)
        return -1;
    Env *env = find_env(uc);
    if (!env) {
        PyErr_SetString(PyExc_RuntimeError, "the engine's registers are not where they should be");
        return -1;
    }
    self->devices = PyList_New(0);
    self->image = PyMem_Calloc((size_t)n_harts, sizeof(Env));
    self->owed = PyMem_Calloc((size_t)n_harts, 1);
    if (!self->devices || !self->image || !self->owed) {
        PyErr_NoMemory();
        return -1;
    }
    self->uc = uc;
    self->env = env;
    self->n_harts = n_harts;
    self->chunk = FIRST_CHUNK;
    self->ecall = ecall == Py_None ? NULL : Py_NewRef(ecall);
    for (int i = 0; i < n_harts; i++) {
        copy_env(&self->image[i], self->env);
        self->image[i].mhartid = (uint64_t)i;
    }
    self->next = engines;
    engines = self;
    static const struct {
        int type;
        void *callback;
    } hooks[] = {
        {UC_HOOK_BLOCK, on_block},
        {UC_HOOK_INTR, on_interrupt},
        {UC_HOOK_INSN_INVALID, on_invalid},
        {UC_HOOK_EDGE_GENERATED, on_generated},
    };
    for (size_t i = 0; i < sizeof hooks / sizeof hooks[0]; i++) {
        size_t hook;
        int error = uc_api.uc_hook_add(uc, &hook, hooks[i].type, hooks[i].callback, self,
                                       (uint64_t)1, (uint64_t)0);
        if (error) {
            PyErr_SetString(PyExc_RuntimeError, uc_api.uc_strerror(error));
            return -1;
        }
    }
    return 0;
}

static void forget_engine(Engine *self)
{
    for (Engine **link = &engines; *link; link = &(*link)->next)
        if (*link == self) {
            *link = self->next;
            break;
        }
    self->env = NULL;
}

static PyObject *engine_close(Engine *self, PyObject *unused)
{
    (void)unused;
    if (!not_running(self))
        return NULL;
    forget_engine(self);
    Py_CLEAR(self->ecall);
    Py_CLEAR(self->devices);
    Py_RETURN_NONE;
}

static int engine_traverse(Engine *self, visitproc visit, void *arg)
{
    Py_VISIT(self->ecall);
    Py_VISIT(self->error_value);
    return self->devices ? visit_windows(self->devices, visit, arg) : 0;
}

static int engine_clear(Engine *self)
{
    Py_CLEAR(self->ecall);
    Py_CLEAR(self->devices);
    Py_CLEAR(self->error_type);
    Py_CLEAR(self->error_value);
    Py_CLEAR(self->error_trace);
    return 0;
}

static void engine_dealloc(Engine *self)
{
    PyObject_GC_UnTrack(self);
    forget_engine(self);
    engine_clear(self);
    PyMem_Free(self->image);
    PyMem_Free(self->owed);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *engine_get_executed(Engine *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->executed);
}

static PyObject *engine_get_current(Engine *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->current);
}

static PyMethodDef engine_methods[] = {
    {"run", (PyCFunction)engine_run, METH_VARARGS, NULL},
    {"stop", (PyCFunction)engine_stop, METH_NOARGS, NULL},
    {"end_turn", (PyCFunction)engine_end_turn, METH_NOARGS, NULL},
    {"select", (PyCFunction)engine_select, METH_VARARGS, NULL},
    {"set_irq", (PyCFunction)engine_set_irq, METH_VARARGS, NULL},
    {"owe_tlb_flush", (PyCFunction)engine_owe_tlb_flush, METH_VARARGS, NULL},
    {"peek", (PyCFunction)engine_peek, METH_VARARGS, NULL},
    {"poke", (PyCFunction)engine_poke, METH_VARARGS, NULL},
    {"get_fflags", (PyCFunction)engine_get_fflags, METH_VARARGS, NULL},
    {"set_fflags", (PyCFunction)engine_set_fflags, METH_VARARGS, NULL},
    {"get_pmp", (PyCFunction)engine_get_pmp, METH_VARARGS, NULL},
    {"set_pmp", (PyCFunction)engine_set_pmp, METH_VARARGS, NULL},
    {"loaded", (PyCFunction)engine_loaded, METH_VARARGS, NULL},
    {"map_mmio", (PyCFunction)engine_map_mmio, METH_VARARGS, NULL},
    {"window_shortcut", (PyCFunction)engine_window_shortcut, METH_VARARGS, NULL},
    {"window_drain", (PyCFunction)engine_window_drain, METH_VARARGS, NULL},
    {"memory_mapped", (PyCFunction)engine_memory_mapped, METH_VARARGS, NULL},
    {"forget_code", (PyCFunction)engine_forget_code, METH_NOARGS, NULL},
    {"written", (PyCFunction)engine_written, METH_VARARGS, NULL},
    {"set_time", (PyCFunction)engine_set_time, METH_VARARGS, NULL},
    {"ticks", (PyCFunction)engine_ticks, METH_NOARGS, NULL},
    {"stats", (PyCFunction)engine_stats, METH_NOARGS, NULL},
    {"close", (PyCFunction)engine_close, METH_NOARGS, NULL},
    {"set_async_stop", (PyCFunction)engine_set_async_stop, METH_O, NULL},
    {"stop_anywhere", (PyCFunction)engine_stop_anywhere, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef engine_getset[] = {
    {"executed", (getter)engine_get_executed, NULL, NULL, NULL},
    {"current", (getter)engine_get_current, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject EngineType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "migrate.vm.riscv64._engine.Engine",
    .tp_basicsize = sizeof(Engine),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)engine_init,
    .tp_dealloc = (destructor)engine_dealloc,
    .tp_traverse = (traverseproc)engine_traverse,
    .tp_clear = (inquiry)engine_clear,
    .tp_methods = engine_methods,
    .tp_getset = engine_getset,
};

static PyMethodDef module_methods[] = {
    {"bind", bind_symbols, METH_O, NULL},
    {"set_code_repair", set_code_repair, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, .m_name = "migrate.vm.riscv64._engine", .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__engine(void)
{
    PyObject *module;
    if (PyType_Ready(&EngineType) < 0 || !(module = PyModule_Create(&module_definition)))
        return NULL;
    PyObject *symbols = symbol_names();
    if (!symbols || PyModule_AddObjectRef(module, "SYMBOLS", symbols) ||
        PyModule_AddIntConstant(module, "CONTEXT_SIZE", (long)SWAP1_SIZE) ||
        PyModule_AddObjectRef(module, "Engine", (PyObject *)&EngineType))
        Py_CLEAR(module);
    Py_XDECREF(symbols);
    return module;
}
