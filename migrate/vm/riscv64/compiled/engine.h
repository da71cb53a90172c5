/*
 * An engine with its harts: what the parts of the extension share. Small functions that lie on hot
 * paths are inline here; what only one part needs stays in its file.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include "unicorn_api.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

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

/* A block of guest memory. */
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

extern Engine *engines; /* all of the process */

static inline uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t guest_ticks(const Engine *self)
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

/* Any thread. The order (flag, then limit) pairs with the re-check in set_limit. */
static inline void ask(Engine *self, unsigned what)
{
    atomic_fetch_or(&self->ask, what);
    atomic_store(&self->limit, 0);
}

static inline Env *env_of(Engine *self, int hart)
{
    return hart == self->current ? self->env : &self->image[hart];
}

static inline void copy_env(Env *to, const Env *from)
{
    memcpy(to, from, SWAP1_SIZE);
    memcpy((char *)to + SWAP2_START, (const char *)from + SWAP2_START, SWAP2_SIZE);
}

/* Only a write of mip sets or clears the engine's interrupt request. */
static inline void rearm(Engine *self)
{
    uint64_t old;
    uc_api.riscv_csrrw_debug(self->env, CSR_MIP, &old, self->env->mip, 2);
}

static inline bool good_hart(Engine *self, int hart)
{
    if (hart >= 0 && hart < self->n_harts)
        return true;
    PyErr_Format(PyExc_IndexError, "no hart %d; there are %d", hart, self->n_harts);
    return false;
}

static inline bool not_running(Engine *self)
{
    if (!self->running)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "not while the hart runs");
    return false;
}

#endif
