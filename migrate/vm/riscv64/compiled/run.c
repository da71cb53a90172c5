/*
 * The run loop and its exact stops: a budget of executed code, a deadline and requests from any
 * thread are looked at on the boundaries of translated blocks, and nowhere else.
 */
#include "run.h"
#include "memory.h"
#include "methods.h"
#include "traps.h"

#define CHUNK_MIN 512
#define CHUNK_MAX (1u << 15)
#define CHECK_NS 10000 /* how often the deadline should be looked at */

void set_limit(Engine *self)
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

int due(Engine *self, uint64_t executed)
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

void on_block(void *uc, uint64_t address, uint32_t size, void *user)
{
    Engine *self = user;
    (void)uc;
    (void)address;
    self->executed += size;
    if (__builtin_expect(self->executed > atomic_load_explicit(&self->limit, memory_order_relaxed), 0))
        block_limit(self, size);
}

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
PyObject *engine_run(Engine *self, PyObject *args)
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

PyObject *engine_stop(Engine *self, PyObject *unused)
{
    (void)unused;
    ask(self, ASK_STOP);
    Py_RETURN_NONE;
}

PyObject *engine_end_turn(Engine *self, PyObject *unused)
{
    (void)unused;
    ask(self, ASK_TURN);
    Py_RETURN_NONE;
}

PyObject *engine_forget_code(Engine *self, PyObject *unused)
{
    (void)unused;
    if (self->running)
        ask(self, ASK_TB_FLUSH);
    else
        tb_flush(self);
    Py_RETURN_NONE;
}

PyObject *engine_written(Engine *self, PyObject *args)
{
    unsigned long long start, end;
    if (!PyArg_ParseTuple(args, "KK", &start, &end))
        return NULL;
    uc_api.tb_invalidate_phys_range(self->uc, start, end);
    Py_RETURN_NONE;
}

PyObject *engine_set_time(Engine *self, PyObject *args)
{
    int kind;
    long long offset;
    if (!PyArg_ParseTuple(args, "iL", &kind, &offset))
        return NULL;
    self->time_kind = kind;
    self->time_offset = offset;
    Py_RETURN_NONE;
}

PyObject *engine_ticks(Engine *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(guest_ticks(self));
}

PyObject *engine_stats(Engine *self, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue("{sKsKsK}", "traps", (unsigned long long)self->n_traps, "kicks",
                         (unsigned long long)self->n_kicks, "switches",
                         (unsigned long long)self->n_switches);
}

PyObject *engine_set_async_stop(Engine *self, PyObject *argument)
{
    self->async_stop = PyObject_IsTrue(argument) == 1;
    Py_RETURN_NONE;
}

/* emu_stop without regard to where the guest is: what P1's test turns on */
PyObject *engine_stop_anywhere(Engine *self, PyObject *unused)
{
    (void)unused;
    uc_api.uc_emu_stop(self->uc);
    Py_RETURN_NONE;
}
