/*
 * CSRs that the engine lacks, or answers from the host's cycle counter, or gets wrong: time, the
 * counters, the PMP's. Installed in its table for all engines of the process.
 */
#include "csrs.h"

static Env *probed_env;
static bool probing;
static csr_write_fn engine_pmpcfg_write, engine_pmpaddr_write;

static Engine *engine_of(const Env *env)
{
    for (Engine *engine = engines; engine; engine = engine->next)
        if (engine->env == env)
            return engine;
    return NULL;
}

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

void install_csrs(void)
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

Env *find_env(void *uc)
{
    uint64_t value = 0;
    probed_env = NULL;
    probing = true;
    uc_api.uc_reg_read(uc, UC_RISCV_REG_TIME, &value);
    probing = false;
    return probed_env && probed_env->uc == uc ? probed_env : NULL;
}
