/*
 * The compiled part of the RISC-V core: what must happen inside the engine, without the GIL.
 *
 * - the block budget: exact stops at a boundary of translated blocks, a reproducible count of
 *   executed code, a stop flag that any thread may set, a deadline
 * - delivery of exceptions to the guest, time and counter CSRs, precise access faults
 * - several harts: register images swapped in and out of the engine's one environment
 * - repair of two functions of the engine that leave translated code stale
 *
 * It knows no device, no board and no file. Addresses of the engine's functions are handed in by
 * native.py; the layout of the environment is that of Unicorn 2.1.4 (CPURISCVState of
 * qemu/target/riscv/cpu.h) and is checked field by field in native.py before anything runs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <elf.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- the engine's environment -------------------------------------------------------------- */

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

/* ---- the engine's functions ---------------------------------------------------------------- */

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

static struct {
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
} uc_api;

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
};
#define N_SYMBOLS (sizeof SYMBOLS / sizeof SYMBOLS[0])
static bool api_ready;

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

/* ---- an engine ----------------------------------------------------------------------------- */

/* Why a run ended; native.py maps them to Reason. */
enum {
    END_NONE,
    END_BUDGET,
    END_DEADLINE,
    END_STOPPED,
    END_TURN,
    END_WFI,
    END_ERROR,
    END_RAISED, /* a Python callback raised */
    END_KICK,   /* go round: nothing for the caller */
};
/* Requests to the next block boundary. */
enum { ASK_STOP = 1, ASK_TURN = 2, ASK_KICK = 4, ASK_RAISED = 8, ASK_REARM = 16, ASK_TB_FLUSH = 32 };

enum { TIME_FROZEN, TIME_REAL, TIME_EXECUTED };

#define CHUNK_MIN 512
#define CHUNK_MAX (1u << 15)
#define TRAP_COST 4 /* so that a guest whose handler traps in turn uses up its budget, too */
#define CHECK_NS 10000 /* how often the deadline should be looked at */

typedef struct {
    uint64_t gpa, size;
    const uint8_t *hva;
    bool readonly;
} Block;

#define MAX_BLOCKS 64

/* Where a store is an access fault: between the blocks of memory, and in read-only ones. */
typedef struct {
    uint64_t first, last;
    size_t hook;
} Forbidden;

typedef struct Engine {
    PyObject_HEAD
    /* what each block touches comes first */
    uint64_t executed;
    _Atomic uint64_t limit; /* the slow path is taken when executed exceeds it */
    void *uc;
    Env *env;
    uint64_t budget_end;
    uint64_t deadline_ns;
    uint64_t chunk;
    uint64_t checked_ns, checked_executed;
    _Atomic unsigned ask;
    int end;
    bool running;
    bool async_stop; /* tests only: the defect that exact stops repair */
    int time_kind;
    int64_t time_offset;
    PyThreadState *thread;
    PyObject *ecall;
    PyObject *devices; /* list of (read, write) kept alive */
    PyObject *error_type, *error_value, *error_trace;
    uint64_t n_traps, n_kicks, n_switches;
    int n_harts, current;
    Env *image;
    uint8_t *owed;
    Block blocks[MAX_BLOCKS]; /* guest memory, by address */
    size_t n_blocks;
    Forbidden forbidden[2 * MAX_BLOCKS + 1];
    size_t n_forbidden;
    bool forbidden_stale;
    struct Engine *next;
} Engine;

static Engine *engines;
static Env *probed_env;
static bool probing;

static uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static Engine *engine_of(const Env *env)
{
    for (Engine *engine = engines; engine; engine = engine->next)
        if (engine->env == env)
            return engine;
    return NULL;
}

static uint64_t guest_ticks(const Engine *self)
{
    switch (self->time_kind) {
    case TIME_REAL:
        return (uint64_t)((int64_t)monotonic_ns() + self->time_offset) / 100;
    case TIME_EXECUTED:
        return (uint64_t)((int64_t)self->executed + self->time_offset) >> 7;
    default:
        return (uint64_t)self->time_offset;
    }
}

/* ---- stops --------------------------------------------------------------------------------- */

/* Any thread. The order (flag, then limit) pairs with the re-check in set_limit. */
static void ask(Engine *self, unsigned what)
{
    atomic_fetch_or(&self->ask, what);
    atomic_store(&self->limit, 0);
}

static void set_limit(Engine *self)
{
    uint64_t limit = self->budget_end ? self->budget_end - 1 : 0;
    if (self->deadline_ns) {
        uint64_t chunk_end = self->executed + self->chunk;
        if (chunk_end < limit)
            limit = chunk_end;
    }
    atomic_store(&self->limit, limit);
    if (atomic_load(&self->ask))
        atomic_store(&self->limit, 0);
}

static int due(Engine *self, uint64_t executed)
{
    unsigned asked = atomic_load(&self->ask);
    if (asked) {
        if (asked & ASK_RAISED)
            return END_RAISED;
        if (asked & ASK_STOP) {
            atomic_fetch_and(&self->ask, ~(unsigned)ASK_STOP);
            return END_STOPPED;
        }
        if (asked & ASK_TURN) {
            atomic_fetch_and(&self->ask, ~(unsigned)ASK_TURN);
            return END_TURN;
        }
    }
    if (executed >= self->budget_end)
        return END_BUDGET;
    if (self->deadline_ns) {
        uint64_t now = monotonic_ns();
        if (now >= self->deadline_ns)
            return END_DEADLINE;
        /* Aim the next look at the clock by how fast the guest went through the last chunk. */
        uint64_t took = now - self->checked_ns;
        bool whole = executed - self->checked_executed >= self->chunk;
        if (took > 2 * CHECK_NS) {
            self->chunk = self->chunk / (took / CHECK_NS);
            if (self->chunk < CHUNK_MIN)
                self->chunk = CHUNK_MIN;
        } else if (whole && took < CHECK_NS / 2 && self->chunk < CHUNK_MAX) {
            self->chunk *= 2;
        }
        self->checked_ns = now;
        self->checked_executed = executed;
    }
    if (asked & (ASK_KICK | ASK_REARM | ASK_TB_FLUSH))
        return END_KICK;
    return END_NONE;
}

static __attribute__((noinline)) void block_limit(Engine *self, uint32_t size)
{
    int end = due(self, self->executed - size);
    if (end == END_NONE) {
        set_limit(self);
        return;
    }
    self->executed -= size; /* the engine leaves before this block runs */
    self->end = end;
    uc_api.uc_emu_stop(self->uc);
}

static void on_block(void *uc, uint64_t address, uint32_t size, void *user)
{
    Engine *self = user;
    (void)uc;
    (void)address;
    self->executed += size;
    if (__builtin_expect(self->executed > atomic_load_explicit(&self->limit, memory_order_relaxed), 0))
        block_limit(self, size);
}

/* ---- traps --------------------------------------------------------------------------------- */

static void deliver(Engine *self, uint64_t cause, uint64_t tval)
{
    Env *env = self->env;
    uint64_t status = env->mstatus, vector;
    self->n_traps++;
    self->executed += TRAP_COST;
    if (env->priv <= PRV_S && (env->medeleg >> cause & 1)) {
        status = (status & ~MSTATUS_SPIE) | (status & MSTATUS_SIE ? MSTATUS_SPIE : 0);
        status = (status & ~MSTATUS_SPP) | (env->priv == PRV_S ? MSTATUS_SPP : 0);
        env->mstatus = status & ~MSTATUS_SIE;
        env->scause = cause;
        env->sepc = env->pc;
        env->sbadaddr = tval;
        vector = env->stvec;
        uc_api.riscv_cpu_set_mode(env, PRV_S);
    } else {
        status = (status & ~MSTATUS_MPIE) | (status & MSTATUS_MIE ? MSTATUS_MPIE : 0);
        status = (status & ~MSTATUS_MPP) | env->priv << 11;
        env->mstatus = status & ~MSTATUS_MIE;
        env->mcause = cause;
        env->mepc = env->pc;
        env->mbadaddr = tval;
        vector = env->mtvec;
        uc_api.riscv_cpu_set_mode(env, PRV_M);
    }
    env->pc = vector & ~3ull;
}

/* A trap is a boundary, too: no block may follow, if the handler cannot be fetched. */
static void trap_limit(Engine *self)
{
    if (self->executed <= atomic_load(&self->limit))
        return;
    int end = due(self, self->executed);
    if (end == END_NONE) {
        set_limit(self);
        return;
    }
    self->end = end;
    uc_api.uc_emu_stop(self->uc);
}

static void take_python_error(Engine *self)
{
    if (!self->error_type)
        PyErr_Fetch(&self->error_type, &self->error_value, &self->error_trace);
    else
        PyErr_Clear();
    ask(self, ASK_RAISED);
}

static void gil_take(Engine *self)
{
    PyEval_RestoreThread(self->thread);
}

static void gil_drop(Engine *self)
{
    self->thread = PyEval_SaveThread();
    if (self->deadline_ns)
        atomic_store(&self->limit, 0); /* Python took its time: look at the clock */
}

static bool on_invalid(void *uc, void *user)
{
    Engine *self = user;
    (void)uc;
    deliver(self, CAUSE_BREAKPOINT, self->env->pc);
    /* The engine keeps an error code until its next start, which would hide access faults. */
    ask(self, ASK_KICK);
    return true;
}

static const uint8_t *host_memory(const Engine *self, uint64_t gpa, uint64_t size)
{
    for (size_t i = 0; i < self->n_blocks; i++) {
        const Block *block = &self->blocks[i];
        if (gpa >= block->gpa && gpa - block->gpa < block->size &&
            block->size - (gpa - block->gpa) >= size)
            return block->hva + (gpa - block->gpa);
    }
    return NULL;
}

/* Half an instruction, by a page walk of our own: the engine's could fault, which outside its main
 * loop is fatal. 0 (an illegal instruction) where there is none. */
static uint32_t fetch(const Engine *self, uint64_t address)
{
    const Env *env = self->env;
    const uint8_t *memory;
    uint16_t half;
    uint64_t mode = env->satp >> 60;
    if (env->priv != PRV_M && mode != 0) {
        uint64_t table = (env->satp & ((1ull << 44) - 1)) << 12, entry = 0;
        int level = (int)mode - 6; /* Sv39 is 8 */
        for (; level >= 0; level--) {
            memory = host_memory(self, table + (address >> (12 + 9 * level) & 511) * 8, 8);
            if (!memory)
                return 0;
            memcpy(&entry, memory, 8);
            table = (entry >> 10 & ((1ull << 44) - 1)) << 12;
            if (!(entry & 1))
                return 0;
            if (entry & 0xe)
                break;
        }
        if (level < 0)
            return 0;
        address = table | (address & ((1ull << (12 + 9 * level)) - 1));
    }
    memory = host_memory(self, address, 2);
    if (!memory)
        return 0;
    memcpy(&half, memory, 2);
    return half;
}

/* The engine does an AMO's load first and calls its faults load faults; they are a store's. */
static uint32_t atomic_cause(const Engine *self, uint32_t cause)
{
    if (cause != 4 && cause != 5 && cause != 13)
        return cause;
    uint64_t pc = self->env->pc;
    if ((fetch(self, pc) & 0x7f) == 0x2f && fetch(self, pc + 2) >> 11 != 2)
        cause += 2;
    return cause;
}

/* The address that the store at pc writes. */
static uint64_t store_address(const Engine *self)
{
    const Env *env = self->env;
    uint32_t insn = fetch(self, env->pc);
    switch (insn & 3) {
    case 3: {
        insn |= fetch(self, env->pc + 2) << 16;
        uint64_t base = env->gpr[insn >> 15 & 31];
        bool atomic = (insn & 0x7f) == 0x2f; /* has no offset */
        int64_t high = (int32_t)insn >> 25;
        return atomic ? base : base + (uint64_t)(high * 32) + (insn >> 7 & 31);
    }
    case 0: { /* c.fsd, c.sw, c.sd */
        uint64_t base = env->gpr[8 + (insn >> 7 & 7)];
        uint32_t high = insn >> 7 & 0x38;
        if ((insn >> 13 & 3) == 2)
            return base + (high | (insn >> 4 & 4) | (insn << 1 & 0x40));
        return base + (high | (insn << 1 & 0xc0));
    }
    default: /* c.fsdsp, c.swsp, c.sdsp */
        if ((insn >> 13 & 3) == 2)
            return env->gpr[2] + ((insn >> 7 & 0x3c) | (insn >> 1 & 0xc0));
        return env->gpr[2] + ((insn >> 7 & 0x38) | (insn >> 1 & 0x1c0));
    }
}

/* The address that the load at pc reads (its registers are still those before it). */
static uint64_t load_address(const Engine *self)
{
    const Env *env = self->env;
    uint32_t insn = fetch(self, env->pc);
    switch (insn & 3) {
    case 3: {
        insn |= fetch(self, env->pc + 2) << 16;
        uint64_t base = env->gpr[insn >> 15 & 31];
        bool atomic = (insn & 0x7f) == 0x2f; /* has no offset */
        return atomic ? base : base + (uint64_t)(int64_t)((int32_t)insn >> 20);
    }
    case 0: { /* c.fld, c.lw, c.ld */
        uint64_t base = env->gpr[8 + (insn >> 7 & 7)];
        uint32_t high = insn >> 7 & 0x38;
        if ((insn >> 13 & 3) == 2)
            return base + (high | (insn >> 4 & 4) | (insn << 1 & 0x40));
        return base + (high | (insn << 1 & 0xc0));
    }
    default: /* c.fldsp, c.lwsp, c.ldsp */
        if ((insn >> 13 & 3) == 2)
            return env->gpr[2] + ((insn >> 7 & 0x20) | (insn >> 2 & 0x1c) | (insn << 4 & 0xc0));
        return env->gpr[2] + ((insn >> 7 & 0x20) | (insn >> 2 & 0x18) | (insn << 4 & 0x1c0));
    }
}

/* The engine gave up on a load or a fetch from where nothing is mapped, with pc at that
 * instruction: an access fault. After a store it goes on to the end of the block; that is what
 * on_forbidden_store is for. */
static bool access_fault(Engine *self, int error)
{
    switch (error) {
    case UC_ERR_FETCH_UNMAPPED:
    case UC_ERR_FETCH_PROT:
        deliver(self, CAUSE_FETCH_ACCESS, self->env->pc);
        return true;
    case UC_ERR_READ_UNMAPPED:
        deliver(self, atomic_cause(self, CAUSE_LOAD_ACCESS), load_address(self));
        return true;
    default:
        return false;
    }
}

static void on_interrupt(void *uc, uint32_t cause, void *user)
{
    Engine *self = user;
    Env *env = self->env;
    uint64_t tval = 0;
    (void)uc;
    if (cause == CAUSE_ECALL_U) {
        if (env->priv == PRV_S && self->ecall) {
            /* pc is past the ecall already, as the handler's caller expects */
            gil_take(self);
            PyObject *result = PyObject_CallFunction(self->ecall, "i", self->current);
            if (result)
                Py_DECREF(result);
            else
                take_python_error(self);
            gil_drop(self);
            return;
        }
        cause += (uint32_t)env->priv;
    }
    env->pc -= 4;
    cause = atomic_cause(self, cause);
    switch (cause) {
    case 0: case 1: case 4: case 5: case 6: case 7: case 12: case 13: case 15:
        tval = env->badaddr;
    }
    deliver(self, cause, tval);
    trap_limit(self);
}

/* ---- CSRs that the engine lacks, or answers from the host's cycle counter --------------------- */

static csr_write_fn engine_pmpcfg_write, engine_pmpaddr_write;

static bool counter_allowed(const Env *env, int csr)
{
    uint64_t allowed = ~0ull;
    if (env->debugger)
        return true;
    if (env->priv < PRV_M)
        allowed &= env->mcounteren;
    if (env->priv < PRV_S)
        allowed &= env->scounteren;
    return allowed >> (csr & 31) & 1;
}

static int csr_read_time(Env *env, int csr, uint64_t *value)
{
    if (probing)
        probed_env = env;
    Engine *self = engine_of(env);
    if (!self || !counter_allowed(env, csr))
        return -1;
    *value = guest_ticks(self);
    return 0;
}

static int csr_read_counter(Env *env, int csr, uint64_t *value)
{
    Engine *self = engine_of(env);
    if (!self)
        return -1; /* an engine without the compiled part emulates them itself */
    if ((csr & 0xF00) == 0xC00 && !counter_allowed(env, csr))
        return -1;
    /* By guest time, so that the counters go on after a migration without a state of their own */
    uint64_t cycles = self->time_kind == TIME_EXECUTED
                          ? (uint64_t)((int64_t)self->executed + self->time_offset)
                          : guest_ticks(self) * 100;
    *value = csr == CSR_MINSTRET || csr == CSR_INSTRET ? cycles / 4 : cycles;
    return 0;
}

/* The engine caches translations over a change of the PMP, and does not recompute the entry above
 * (whose range may start where this one ends). */
static int csr_write_pmp(Env *env, int csr, uint64_t value)
{
    int result = csr < CSR_PMPADDR0 ? engine_pmpcfg_write(env, csr, value)
                                    : engine_pmpaddr_write(env, csr, value);
    if (csr >= CSR_PMPADDR0 && csr < CSR_PMPADDR0 + 15) {
        int above = csr - CSR_PMPADDR0 + 1;
        if (!(env->pmp[above].cfg_reg & 0x80) && (env->pmp[above].cfg_reg >> 3 & 3) == 1)
            uc_api.pmpaddr_csr_write(env, (uint32_t)above, env->pmp[above].addr_reg);
    }
    uc_api.tcg_flush_softmmu_tlb(env->uc);
    return result;
}

static void install_csrs(void)
{
    static const int counters[] = {CSR_CYCLE, CSR_INSTRET, CSR_MCYCLE, CSR_MINSTRET};
    CsrOps ops, any;
    uc_api.riscv_get_csr_ops(CSR_MHARTID, &any);
    for (size_t i = 0; i < sizeof counters / sizeof counters[0]; i++) {
        uc_api.riscv_get_csr_ops(counters[i], &ops);
        ops.predicate = any.predicate;
        ops.read = csr_read_counter;
        uc_api.riscv_set_csr_ops(counters[i], &ops);
    }
    uc_api.riscv_get_csr_ops(CSR_TIME, &ops);
    ops.read = csr_read_time;
    uc_api.riscv_set_csr_ops(CSR_TIME, &ops);
    for (int i = 0; i < 20; i++) {
        int csr = i < 4 ? CSR_PMPCFG0 + i : CSR_PMPADDR0 + i - 4;
        uc_api.riscv_get_csr_ops(csr, &ops);
        *(i < 4 ? &engine_pmpcfg_write : &engine_pmpaddr_write) = ops.write;
        ops.write = csr_write_pmp;
        uc_api.riscv_set_csr_ops(csr, &ops);
    }
}

/* ---- stale translated code ------------------------------------------------------------------ */

static void (*original_fast)(void *, void *, uint64_t, int, uintptr_t);
static void (*original_reset)(void *, uint64_t, uint64_t);
static void **slot_fast, **slot_reset;
static bool repaired;
static ptrdiff_t env_in_cpu; /* learned when the engine first generates code */

/* A store to a page with translated code: the engine looks only at the bytes stored. */
static void whole_page(void *uc, void *pages, uint64_t start, int size, uintptr_t retaddr)
{
    uint64_t page = start & ~0xfffull;
    (void)pages;
    (void)size;
    (void)retaddr;
    uc_api.tb_invalidate_phys_page_range(uc, page, page + 0x1000);
}

/* New code in a page: the engine arms the writes through that virtual address only. */
static void every_alias(void *cpu, uint64_t start, uint64_t size)
{
    (void)start;
    (void)size;
    if (!env_in_cpu)
        for (Engine *engine = engines; engine; engine = engine->next)
            if ((char *)engine->env > (char *)cpu && (char *)engine->env - (char *)cpu < 1 << 18)
                env_in_cpu = (char *)engine->env - (char *)cpu;
    original_reset(cpu, 0, UINT64_MAX);
}

typedef struct {
    uintptr_t inside; /* an address in the wanted object */
} FindSlots;

static int find_slots(struct dl_phdr_info *info, size_t size, void *data)
{
    FindSlots *find = data;
    const ElfW(Dyn) *dynamic = NULL;
    bool inside = false;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + header->p_vaddr;
        if (header->p_type == PT_LOAD && find->inside >= start &&
            find->inside < start + header->p_memsz)
            inside = true;
        if (header->p_type == PT_DYNAMIC)
            dynamic = (const ElfW(Dyn) *)start;
    }
    if (!inside || !dynamic)
        return 0;
    const char *strings = NULL;
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Rela) *relocations = NULL;
    size_t n = 0;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        if (dynamic->d_tag == DT_STRTAB)
            strings = (const char *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_SYMTAB)
            symbols = (const ElfW(Sym) *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_JMPREL)
            relocations = (const ElfW(Rela) *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_PLTRELSZ)
            n = dynamic->d_un.d_val / sizeof(ElfW(Rela));
        else if (dynamic->d_tag == DT_PLTREL && dynamic->d_un.d_val != DT_RELA)
            return 1;
    }
    if (!strings || !symbols || !relocations)
        return 1;
    for (size_t i = 0; i < n; i++) {
        const char *name = strings + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
        void **slot = (void **)(info->dlpi_addr + relocations[i].r_offset);
        if (!strcmp(name, "tb_invalidate_phys_page_fast_riscv64"))
            slot_fast = slot;
        else if (!strcmp(name, "tlb_reset_dirty_by_vaddr_riscv64"))
            slot_reset = slot;
    }
    return 1;
}

static bool write_slot(void **slot, void *value)
{
    uintptr_t page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *page = (void *)((uintptr_t)slot & ~(page_size - 1));
    /* Left writable: the linker's lazy binding may want it so, and a page of it is shared. */
    if (mprotect(page, page_size, PROT_READ | PROT_WRITE))
        return false;
    *slot = value;
    return true;
}

static PyObject *set_code_repair(PyObject *module, PyObject *argument)
{
    int on = PyObject_IsTrue(argument);
    (void)module;
    if (on < 0)
        return NULL;
    if (!slot_fast || !slot_reset) {
        PyErr_SetString(PyExc_RuntimeError, "the engine does not call its functions by its GOT");
        return NULL;
    }
    if (on != repaired) {
        if (!write_slot(slot_fast, on ? (void *)whole_page : (void *)original_fast) ||
            !write_slot(slot_reset, on ? (void *)every_alias : (void *)original_reset))
            return PyErr_SetFromErrno(PyExc_OSError);
        repaired = on;
    }
    Py_RETURN_NONE;
}

/* bind(symbols: dict[str, int]): the engine's functions, once a process */
static PyObject *bind(PyObject *module, PyObject *symbols)
{
    (void)module;
    if (api_ready)
        Py_RETURN_NONE;
    if (!PyDict_Check(symbols)) {
        PyErr_SetString(PyExc_TypeError, "a dict of addresses expected");
        return NULL;
    }
    void *pointers[N_SYMBOLS + 2];
    for (size_t i = 0; i < N_SYMBOLS + 2; i++) {
        const char *name = i < N_SYMBOLS ? SYMBOLS[i].name
                           : i == N_SYMBOLS ? "tb_invalidate_phys_page_fast_riscv64"
                                            : "tlb_reset_dirty_by_vaddr_riscv64";
        PyObject *address = PyDict_GetItemString(symbols, name);
        if (!address)
            return PyErr_Format(PyExc_LookupError, "the engine has no function %s", name);
        pointers[i] = PyLong_AsVoidPtr(address);
        if (!pointers[i])
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_LookupError, "%s is null", name);
    }
    for (size_t i = 0; i < N_SYMBOLS; i++)
        *SYMBOLS[i].where = pointers[i];
    original_fast = (void (*)(void *, void *, uint64_t, int, uintptr_t))pointers[N_SYMBOLS];
    original_reset = (void (*)(void *, uint64_t, uint64_t))pointers[N_SYMBOLS + 1];
    FindSlots find = {(uintptr_t)pointers[N_SYMBOLS]};
    dl_iterate_phdr(find_slots, &find);
    install_csrs();
    api_ready = true;
    Py_RETURN_NONE;
}

/* ---- stores to where there is no memory ------------------------------------------------------ */

/* Called in the middle of the store, with pc at it. Does not return: the engine's main loop goes
 * on with on_interrupt. */
static bool on_forbidden_store(void *uc, int type, uint64_t gpa, int size, int64_t value, void *user)
{
    Engine *self = user;
    (void)uc;
    (void)type;
    (void)gpa;
    (void)size;
    (void)value;
    if (!self->running)
        return false;
    self->env->badaddr = store_address(self);
    uc_api.riscv_raise_exception(self->env, CAUSE_STORE_ACCESS, 0);
    return false;
}

typedef struct {
    uint64_t pc;
    uint16_t instructions, size;
} GeneratedBlock;

/* The engine does not arm writes to the page of new code (see every_alias) whose virtual address
 * lies within the bounds of a hook for physical ones. */
static void on_generated(void *uc, GeneratedBlock *block, GeneratedBlock *before, void *user)
{
    Engine *self = user;
    (void)uc;
    (void)before;
    if (!repaired)
        return;
    for (size_t i = 0; i < self->n_forbidden; i++)
        if (block->pc >= self->forbidden[i].first && block->pc <= self->forbidden[i].last) {
            original_reset((char *)self->env - env_in_cpu, 0, UINT64_MAX);
            return;
        }
}

static void forbid(Engine *self, int hook_type, uint64_t first, uint64_t last)
{
    Forbidden *range = &self->forbidden[self->n_forbidden];
    *range = (Forbidden){first, last, 0};
    if (!uc_api.uc_hook_add(self->uc, &range->hook, hook_type, on_forbidden_store, self, first, last))
        self->n_forbidden++;
}

/* Between two runs: hooks around the memory as it is now. */
static void forbid_stores(Engine *self)
{
    if (!self->forbidden_stale || !env_in_cpu)
        return;
    self->forbidden_stale = false;
    while (self->n_forbidden)
        uc_api.uc_hook_del(self->uc, self->forbidden[--self->n_forbidden].hook);
    uint64_t next = 0;
    for (size_t i = 0; i < self->n_blocks; i++) {
        const Block *block = &self->blocks[i];
        if (block->gpa > next)
            forbid(self, UC_HOOK_MEM_WRITE_UNMAPPED, next, block->gpa - 1);
        if (block->readonly)
            forbid(self, UC_HOOK_MEM_WRITE_PROT, block->gpa, block->gpa + block->size - 1);
        next = block->gpa + block->size;
    }
    forbid(self, UC_HOOK_MEM_WRITE_UNMAPPED, next, UINT64_MAX - 1);
}

/* ---- harts ---------------------------------------------------------------------------------- */

static Env *env_of(Engine *self, int hart)
{
    return hart == self->current ? self->env : &self->image[hart];
}

static void copy_env(Env *to, const Env *from)
{
    memcpy(to, from, SWAP1_SIZE);
    memcpy((char *)to + SWAP2_START, (const char *)from + SWAP2_START, SWAP2_SIZE);
}

/* Only a write of mip sets or clears the engine's interrupt request. */
static void rearm(Engine *self)
{
    uint64_t old;
    uc_api.riscv_csrrw_debug(self->env, CSR_MIP, &old, self->env->mip, 2);
}

static void flush_tlb(Engine *self, int hart)
{
    if (hart == self->current)
        uc_api.tcg_flush_softmmu_tlb(self->uc);
    else
        self->owed[hart] = 1;
}

static bool good_hart(Engine *self, int hart)
{
    if (hart >= 0 && hart < self->n_harts)
        return true;
    PyErr_Format(PyExc_IndexError, "no hart %d; there are %d", hart, self->n_harts);
    return false;
}

static bool not_running(Engine *self)
{
    if (!self->running)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "not while the hart runs");
    return false;
}

static PyObject *engine_select(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart) || !not_running(self))
        return NULL;
    if (hart == self->current)
        Py_RETURN_NONE;
    Env *env = self->env, *out = &self->image[self->current], *in = &self->image[hart];
    env->load_res = UINT64_MAX; /* other harts may store before it comes back */
    copy_env(out, env);
    copy_env(env, in);
    self->current = hart;
    self->n_switches++;
    if (self->owed[hart] || in->satp != out->satp ||
        ((in->mstatus ^ out->mstatus) & MSTATUS_MEMORY) ||
        memcmp(in->pmp, out->pmp, offsetof(Env, rdtime_fn) - offsetof(Env, pmp)))
        uc_api.tcg_flush_softmmu_tlb(self->uc);
    self->owed[hart] = 0;
    rearm(self);
    Py_RETURN_NONE;
}

static PyObject *engine_set_irq(Engine *self, PyObject *args)
{
    int hart;
    unsigned long long mask, value;
    if (!PyArg_ParseTuple(args, "iKK", &hart, &mask, &value) || !good_hart(self, hart))
        return NULL;
    Env *env = env_of(self, hart);
    uint64_t new = (env->mip & ~mask) | (value & mask);
    bool more = new & ~env->mip;
    env->mip = new;
    if (hart == self->current && more) {
        if (self->running)
            ask(self, ASK_REARM); /* before the next block, whether blocks are chained or not */
        else
            rearm(self);
    }
    Py_RETURN_NONE;
}

static PyObject *engine_owe_tlb_flush(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart))
        return NULL;
    flush_tlb(self, hart);
    Py_RETURN_NONE;
}

static PyObject *engine_peek(Engine *self, PyObject *args)
{
    int hart;
    unsigned offset;
    if (!PyArg_ParseTuple(args, "iI", &hart, &offset) || !good_hart(self, hart))
        return NULL;
    if (offset % 8 || offset + 8 > SWAP1_SIZE) {
        PyErr_SetString(PyExc_IndexError, "no such field");
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(*(uint64_t *)((char *)env_of(self, hart) + offset));
}

static PyObject *engine_poke(Engine *self, PyObject *args)
{
    int hart;
    unsigned offset;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "iIK", &hart, &offset, &value) || !good_hart(self, hart))
        return NULL;
    if (offset % 8 || offset + 8 > SWAP1_SIZE) {
        PyErr_SetString(PyExc_IndexError, "no such field");
        return NULL;
    }
    *(uint64_t *)((char *)env_of(self, hart) + offset) = value;
    Py_RETURN_NONE;
}

static PyObject *engine_get_fflags(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart))
        return NULL;
    return PyLong_FromUnsignedLongLong(uc_api.riscv_cpu_get_fflags(env_of(self, hart)));
}

static PyObject *engine_set_fflags(Engine *self, PyObject *args)
{
    int hart;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "iK", &hart, &value) || !good_hart(self, hart))
        return NULL;
    uc_api.riscv_cpu_set_fflags(env_of(self, hart), value & 31);
    Py_RETURN_NONE;
}

/* get_pmp(hart) -> bytes of 16 cfg, then 16 little-endian u64 addresses */
static PyObject *engine_get_pmp(Engine *self, PyObject *args)
{
    int hart;
    uint8_t packed[16 + 16 * 8];
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart))
        return NULL;
    const Env *env = env_of(self, hart);
    for (int i = 0; i < 16; i++) {
        packed[i] = env->pmp[i].cfg_reg;
        memcpy(packed + 16 + i * 8, &env->pmp[i].addr_reg, 8);
    }
    return PyBytes_FromStringAndSize((const char *)packed, sizeof packed);
}

static PyObject *engine_set_pmp(Engine *self, PyObject *args)
{
    int hart;
    Py_buffer packed;
    if (!PyArg_ParseTuple(args, "iy*", &hart, &packed))
        return NULL;
    if (!good_hart(self, hart) || packed.len != 16 + 16 * 8) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "16 cfg bytes and 16 addresses expected");
        PyBuffer_Release(&packed);
        return NULL;
    }
    Env *env = env_of(self, hart);
    const uint8_t *bytes = packed.buf;
    for (int i = 0; i < 16; i++)
        env->pmp[i].cfg_reg = 0; /* unlocks: a locked entry would refuse its address */
    for (uint32_t i = 0; i < 16; i++) {
        uint64_t address;
        memcpy(&address, bytes + 16 + i * 8, 8);
        uc_api.pmpaddr_csr_write(env, i, address);
    }
    for (uint32_t i = 0; i < 2; i++) {
        uint64_t cfg;
        memcpy(&cfg, bytes + i * 8, 8);
        uc_api.pmpcfg_csr_write(env, i * 2, cfg); /* RV64 has only the even ones */
    }
    PyBuffer_Release(&packed);
    flush_tlb(self, hart);
    Py_RETURN_NONE;
}

/* loaded(hart): registers were written from outside; make the engine's insides agree */
static PyObject *engine_loaded(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart) || !not_running(self))
        return NULL;
    flush_tlb(self, hart);
    if (hart == self->current)
        rearm(self);
    Py_RETURN_NONE;
}

/* ---- MMIO ------------------------------------------------------------------------------------ */

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

static PyObject *engine_map_mmio(Engine *self, PyObject *args)
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

/* memory_mapped(gpa, size, hva, readonly): what there is of memory; hva 0 takes it out */
static PyObject *engine_memory_mapped(Engine *self, PyObject *args)
{
    unsigned long long gpa, size, hva;
    int readonly;
    size_t i = 0;
    if (!PyArg_ParseTuple(args, "KKKp", &gpa, &size, &hva, &readonly) || !not_running(self))
        return NULL;
    while (i < self->n_blocks && self->blocks[i].gpa < gpa)
        i++;
    size_t after = (self->n_blocks - i) * sizeof(Block);
    if (hva) {
        if (self->n_blocks == MAX_BLOCKS) {
            PyErr_Format(PyExc_ValueError, "more than %d blocks of memory", MAX_BLOCKS);
            return NULL;
        }
        memmove(&self->blocks[i + 1], &self->blocks[i], after);
        self->blocks[i] = (Block){gpa, size, (const uint8_t *)(uintptr_t)hva, readonly};
        self->n_blocks++;
    } else if (i < self->n_blocks && self->blocks[i].gpa == gpa) {
        memmove(&self->blocks[i], &self->blocks[i + 1], after - sizeof(Block));
        self->n_blocks--;
    }
    self->forbidden_stale = true;
    Py_RETURN_NONE;
}

/* ---- running ---------------------------------------------------------------------------------- */

static void tb_flush(Engine *self)
{
    uc_api.uc_ctl(self->uc, UC_CTL_TB_FLUSH_WRITE);
}

/* Requests that want the engine at rest. */
static void settle(Engine *self)
{
    unsigned asked = atomic_fetch_and(&self->ask, ~(unsigned)(ASK_KICK | ASK_REARM | ASK_TB_FLUSH));
    if (asked & ASK_TB_FLUSH)
        tb_flush(self);
    if (asked & ASK_REARM)
        rearm(self);
}

/* run(budget, deadline_ns) -> (end, engine's error) ; releases the GIL */
static PyObject *engine_run(Engine *self, PyObject *args)
{
    unsigned long long budget, deadline;
    int end, error = 0;
    if (!PyArg_ParseTuple(args, "KK", &budget, &deadline) || !not_running(self))
        return NULL;
    self->budget_end = self->executed + budget;
    if (self->budget_end < self->executed)
        self->budget_end = UINT64_MAX;
    self->deadline_ns = deadline;
    self->checked_ns = deadline ? monotonic_ns() : 0;
    self->checked_executed = self->executed;
    forbid_stores(self);
    self->running = true;
    self->thread = PyEval_SaveThread();
    for (;;) {
        settle(self);
        end = due(self, self->executed);
        if (end == END_KICK)
            continue;
        if (end != END_NONE)
            break;
        self->end = END_NONE;
        set_limit(self);
        error = uc_api.uc_emu_start(self->uc, self->env->pc, 0, 0, 0);
        end = self->end;
        if (end == END_KICK) {
            self->n_kicks++;
            continue;
        }
        if (end != END_NONE)
            break;
        if (error == UC_ERR_EXCEPTION && (atomic_load(&self->ask) & ASK_KICK))
            continue; /* left over from an ebreak that was delivered */
        if (error && access_fault(self, error))
            continue;
        if (error) {
            end = END_ERROR;
            break;
        }
        if (self->async_stop) {
            end = END_STOPPED;
            break;
        }
        if (!(self->env->mip & self->env->mie)) {
            end = END_WFI;
            break;
        }
    }
    PyEval_RestoreThread(self->thread);
    self->running = false;
    settle(self);
    atomic_fetch_and(&self->ask, ~(unsigned)ASK_TURN); /* was for this run */
    if (end == END_RAISED) {
        atomic_fetch_and(&self->ask, ~(unsigned)ASK_RAISED);
        PyErr_Restore(self->error_type, self->error_value, self->error_trace);
        self->error_type = self->error_value = self->error_trace = NULL;
        return NULL;
    }
    return Py_BuildValue("ii", end, end == END_ERROR ? error : 0);
}

static PyObject *engine_stop(Engine *self, PyObject *unused)
{
    (void)unused;
    ask(self, ASK_STOP);
    Py_RETURN_NONE;
}

static PyObject *engine_end_turn(Engine *self, PyObject *unused)
{
    (void)unused;
    ask(self, ASK_TURN);
    Py_RETURN_NONE;
}

static PyObject *engine_forget_code(Engine *self, PyObject *unused)
{
    (void)unused;
    if (self->running)
        ask(self, ASK_TB_FLUSH);
    else
        tb_flush(self);
    Py_RETURN_NONE;
}

static PyObject *engine_written(Engine *self, PyObject *args)
{
    unsigned long long start, end;
    if (!PyArg_ParseTuple(args, "KK", &start, &end))
        return NULL;
    uc_api.tb_invalidate_phys_range(self->uc, start, end);
    Py_RETURN_NONE;
}

static PyObject *engine_set_time(Engine *self, PyObject *args)
{
    int kind;
    long long offset;
    if (!PyArg_ParseTuple(args, "iL", &kind, &offset))
        return NULL;
    self->time_kind = kind;
    self->time_offset = offset;
    Py_RETURN_NONE;
}

static PyObject *engine_ticks(Engine *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(guest_ticks(self));
}

static PyObject *engine_stats(Engine *self, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue("{sKsKsK}", "traps", (unsigned long long)self->n_traps, "kicks",
                         (unsigned long long)self->n_kicks, "switches",
                         (unsigned long long)self->n_switches);
}

static PyObject *engine_set_async_stop(Engine *self, PyObject *argument)
{
    self->async_stop = PyObject_IsTrue(argument) == 1;
    Py_RETURN_NONE;
}

/* emu_stop without regard to where the guest is: what P1's test turns on */
static PyObject *engine_stop_anywhere(Engine *self, PyObject *unused)
{
    (void)unused;
    uc_api.uc_emu_stop(self->uc);
    Py_RETURN_NONE;
}

/* ---- the type --------------------------------------------------------------------------------- */

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
    uint64_t value = 0;
    probed_env = NULL;
    probing = true;
    uc_api.uc_reg_read(uc, UC_RISCV_REG_TIME, &value);
    probing = false;
    if (!probed_env || probed_env->uc != uc) {
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
    self->env = probed_env;
    self->n_harts = n_harts;
    self->chunk = 16384;
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
    if (self->devices)
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(self->devices); i++) {
            Window *window = PyCapsule_GetPointer(PyList_GET_ITEM(self->devices, i), "window");
            Py_VISIT(window->read);
            Py_VISIT(window->write);
        }
    Py_VISIT(self->error_value);
    return 0;
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
    {"bind", bind, METH_O, NULL},
    {"set_code_repair", set_code_repair, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, .m_name = "migrate.vm.riscv64._engine", .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__engine(void)
{
    PyObject *module = NULL, *symbols = NULL;
    if (PyType_Ready(&EngineType) < 0 || !(module = PyModule_Create(&module_definition)))
        return NULL;
    symbols = PyList_New(0);
    if (!symbols)
        goto fail;
    for (size_t i = 0; i < N_SYMBOLS; i++) {
        PyObject *name = PyUnicode_FromString(SYMBOLS[i].name);
        if (!name || PyList_Append(symbols, name))
            goto fail;
        Py_DECREF(name);
    }
    if (PyModule_AddObjectRef(module, "SYMBOLS", symbols) ||
        PyModule_AddIntConstant(module, "CONTEXT_SIZE", (long)SWAP1_SIZE) ||
        PyModule_AddObjectRef(module, "Engine", (PyObject *)&EngineType))
        goto fail;
    Py_DECREF(symbols);
    return module;
fail:
    Py_XDECREF(symbols);
    Py_XDECREF(module);
    return NULL;
}
