/* The engine's functions: their names, and where their addresses are kept. */
#include "unicorn_api.h"
#include "code_repair.h"
#include "csrs.h"

UcApi uc_api;
bool api_ready;

#define SYMBOL(name, suffix) {#name suffix, (void **)&uc_api.name}
static const struct {
    const char *name;
    void **where;
} SYMBOLS[] = {
    SYMBOL(uc_emu_start, ""),
    SYMBOL(uc_emu_stop, ""),
    SYMBOL(uc_hook_add, ""),
    SYMBOL(uc_hook_del, ""),
    SYMBOL(uc_reg_read, ""),
    SYMBOL(uc_ctl, ""),
    SYMBOL(uc_mmio_map, ""),
    SYMBOL(uc_strerror, ""),
    SYMBOL(riscv_get_csr_ops, "_riscv64"),
    SYMBOL(riscv_set_csr_ops, "_riscv64"),
    SYMBOL(riscv_csrrw_debug, "_riscv64"),
    SYMBOL(riscv_cpu_set_mode, "_riscv64"),
    SYMBOL(riscv_raise_exception, "_riscv64"),
    SYMBOL(riscv_cpu_get_fflags, "_riscv64"),
    SYMBOL(riscv_cpu_set_fflags, "_riscv64"),
    SYMBOL(pmpcfg_csr_write, "_riscv64"),
    SYMBOL(pmpaddr_csr_write, "_riscv64"),
    SYMBOL(tcg_flush_softmmu_tlb, "_riscv64"),
    SYMBOL(tb_invalidate_phys_range, "_riscv64"),
    SYMBOL(tb_invalidate_phys_page_range, "_riscv64"),
    SYMBOL(tb_invalidate_phys_page_fast, "_riscv64"),
    SYMBOL(tlb_reset_dirty_by_vaddr, "_riscv64"),
};
#define N_SYMBOLS (sizeof SYMBOLS / sizeof SYMBOLS[0])

/* bind(symbols: dict[str, int]): the engine's functions, once a process */
PyObject *bind_symbols(PyObject *module, PyObject *symbols)
{
    (void)module;
    if (api_ready)
        Py_RETURN_NONE;
    if (!PyDict_Check(symbols)) {
        PyErr_SetString(PyExc_TypeError, "a dict of addresses expected");
        return NULL;
    }
    void *pointers[N_SYMBOLS];
    for (size_t i = 0; i < N_SYMBOLS; i++) {
        const char *name = SYMBOLS[i].name;
        PyObject *address = PyDict_GetItemString(symbols, name);
        if (!address)
            return PyErr_Format(PyExc_LookupError, "the engine has no function %s", name);
        pointers[i] = PyLong_AsVoidPtr(address);
        if (!pointers[i])
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_LookupError, "%s is null", name);
    }
    for (size_t i = 0; i < N_SYMBOLS; i++)
        *SYMBOLS[i].where = pointers[i];
    find_calls_to_repair();
    install_csrs();
    api_ready = true;
    Py_RETURN_NONE;
}

/* A new list of all that `bind` wants. */
PyObject *symbol_names(void)
{
    PyObject *names = PyList_New(0);
    if (!names)
        return NULL;
    for (size_t i = 0; i < N_SYMBOLS; i++) {
        PyObject *name = PyUnicode_FromString(SYMBOLS[i].name);
        int failed = !name || PyList_Append(names, name);
        Py_XDECREF(name);
        if (failed) {
            Py_DECREF(names);
            return NULL;
        }
    }
    return names;
}
