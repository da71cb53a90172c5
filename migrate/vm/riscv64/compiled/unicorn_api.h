/*
 * The functions of the loaded libunicorn, public and internal, by their own names, and the numbers
 * of unicorn.h 2.1.4. native.py looks the addresses up; `bind` takes them in, once a process.
 */
#ifndef UNICORN_API_H
#define UNICORN_API_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

#include "environment.h"

typedef int (*csr_predicate_fn)(Env *, int);
typedef int (*csr_read_fn)(Env *, int, uint64_t *);
typedef int (*csr_write_fn)(Env *, int, uint64_t);
typedef int (*csr_op_fn)(Env *, int, uint64_t *, uint64_t, uint64_t);
typedef struct {
    csr_predicate_fn predicate;
    csr_read_fn read;
    csr_write_fn write;
    csr_op_fn op;
} CsrOps;

typedef struct {
    int (*uc_emu_start)(void *, uint64_t, uint64_t, uint64_t, size_t);
    int (*uc_emu_stop)(void *);
    int (*uc_hook_add)(void *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
    int (*uc_hook_del)(void *, size_t);
    int (*uc_reg_read)(void *, int, void *);
    int (*uc_ctl)(void *, unsigned, ...);
    int (*uc_mmio_map)(void *, uint64_t, size_t, void *, void *, void *, void *);
    const char *(*uc_strerror)(int);
    void (*riscv_get_csr_ops)(int, CsrOps *);
    void (*riscv_set_csr_ops)(int, CsrOps *);
    int (*riscv_csrrw_debug)(Env *, int, uint64_t *, uint64_t, uint64_t);
    void (*riscv_cpu_set_mode)(Env *, uint64_t);
    void (*riscv_raise_exception)(Env *, uint32_t, uintptr_t);
    uint64_t (*riscv_cpu_get_fflags)(Env *);
    void (*riscv_cpu_set_fflags)(Env *, uint64_t);
    void (*pmpcfg_csr_write)(Env *, uint32_t, uint64_t);
    void (*pmpaddr_csr_write)(Env *, uint32_t, uint64_t);
    void (*tcg_flush_softmmu_tlb)(void *);
    void (*tb_invalidate_phys_range)(void *, uint64_t, uint64_t);
    void (*tb_invalidate_phys_page_range)(void *, uint64_t, uint64_t);
    void (*tb_invalidate_phys_page_fast)(void *, void *, uint64_t, int, uintptr_t);
    void (*tlb_reset_dirty_by_vaddr)(void *, uint64_t, uint64_t);
} UcApi;

extern UcApi uc_api;
extern bool api_ready;

PyObject *bind_symbols(PyObject *module, PyObject *symbols);
PyObject *symbol_names(void);

/* Numbers of unicorn.h 2.1.4 */
enum {
    UC_HOOK_INTR = 1 << 0,
    UC_HOOK_BLOCK = 1 << 3,
    UC_HOOK_MEM_WRITE_UNMAPPED = 1 << 5,
    UC_HOOK_MEM_WRITE_PROT = 1 << 8,
    UC_HOOK_INSN_INVALID = 1 << 14,
    UC_HOOK_EDGE_GENERATED = 1 << 15,
    UC_ERR_READ_UNMAPPED = 6,
    UC_ERR_FETCH_UNMAPPED = 8,
    UC_ERR_FETCH_PROT = 14,
    UC_ERR_EXCEPTION = 21,
    UC_RISCV_REG_TIME = 45,
};
#define UC_CTL_TB_FLUSH_WRITE (10u | 0u << 26 | 1u << 30)

#endif
