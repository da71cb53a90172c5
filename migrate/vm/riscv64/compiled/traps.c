/*
 * Delivery of exceptions to the guest: what a hart does when it traps, which the engine leaves to
 * its user.
 */
#include "traps.h"
#include "callback.h"
#include "decode.h"
#include "run.h"

/* So that a guest whose handler traps in turn uses up its budget, too. */
#define TRAP_COST 4

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

bool on_invalid(void *uc, void *user)
{
    Engine *self = user;
    (void)uc;
    deliver(self, CAUSE_BREAKPOINT, self->env->pc);
    /* The engine keeps an error code until its next start, which would hide access faults. */
    ask(self, ASK_KICK);
    return true;
}

/* The engine does an AMO's load first and calls its faults load faults; they are a store's. */
static uint32_t atomic_cause(const Engine *self, uint32_t cause)
{
    if (cause != 4 && cause != 5 && cause != 13)
        return cause;
    return stores_atomically(self) ? cause + 2 : cause;
}

/* The engine gave up on a load or a fetch from where nothing is mapped, with pc at that
 * instruction: an access fault. After a store it goes on to the end of the block; that is what
 * on_forbidden_store is for. */
bool access_fault(Engine *self, int error)
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

void on_interrupt(void *uc, uint32_t cause, void *user)
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
