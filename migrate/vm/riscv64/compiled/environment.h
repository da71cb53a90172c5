/*
 * The harts' registers as the engine keeps them: CPURISCVState of qemu/target/riscv/cpu.h in
 * Unicorn 2.1.4, and the numbers of the privileged architecture that go with it. layout.py and
 * native.py check the layout field by field before anything runs.
 */
#ifndef ENVIRONMENT_H
#define ENVIRONMENT_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t addr_reg;
    uint8_t cfg_reg;
} PmpEntry;

typedef struct {
    uint64_t gpr[32], fpr[32], pc, load_res, load_val, frm, badaddr, guest_phys_fault_addr;
    uint64_t priv_ver, misa, misa_mask;
    uint32_t features;
    uint64_t priv, virt, resetvec, mhartid, mstatus, mip;
    uint32_t miclaim;
    uint64_t mie, mideleg, sptbr, satp, sbadaddr, mbadaddr, medeleg;
    uint64_t stvec, sepc, scause, mtvec, mepc, mcause, mtval;
    uint64_t hypervisor[24];
    uint64_t scounteren, mcounteren, sscratch, mscratch, mfromhost, mtohost, timecmp;
    PmpEntry pmp[16];
    struct {
        uint64_t start, end;
    } pmp_range[16];
    uint32_t pmp_rules;
    void *rdtime_fn; /* a host pointer: never swapped, never saved */
    uint8_t debugger;
    uint8_t fp_status[8];
    void *timer;
    void *uc;
} Env;

#define SWAP1_SIZE offsetof(Env, rdtime_fn)
#define SWAP2_START offsetof(Env, debugger)
#define SWAP2_SIZE (offsetof(Env, timer) - SWAP2_START)

enum { PRV_U = 0, PRV_S = 1, PRV_M = 3 };
enum {
    CAUSE_FETCH_ACCESS = 1,
    CAUSE_BREAKPOINT = 3,
    CAUSE_LOAD_ACCESS = 5,
    CAUSE_STORE_ACCESS = 7,
    CAUSE_ECALL_U = 8,
};
#define MSTATUS_SIE (1ull << 1)
#define MSTATUS_MIE (1ull << 3)
#define MSTATUS_SPIE (1ull << 5)
#define MSTATUS_MPIE (1ull << 7)
#define MSTATUS_SPP (1ull << 8)
#define MSTATUS_MPP (3ull << 11)
#define MSTATUS_MPRV (1ull << 17)
#define MSTATUS_MEMORY (MSTATUS_MPP | MSTATUS_MPRV | 1ull << 18 | 1ull << 19) /* and SUM, MXR */

enum { CSR_MIP = 0x344, CSR_CYCLE = 0xC00, CSR_TIME = 0xC01, CSR_INSTRET = 0xC02 };
enum { CSR_MHARTID = 0xF14, CSR_MCYCLE = 0xB00, CSR_MINSTRET = 0xB02, CSR_PMPCFG0 = 0x3A0, CSR_PMPADDR0 = 0x3B0 };

#endif
