/*
 * Several harts in the engine's one environment: the selected one is in it, the others are images
 * beside it. Registers of any of them, interrupts, the PMP.
 */
#include "engine.h"
#include "methods.h"

static void flush_tlb(Engine *self, int hart)
{
    if (hart == self->current)
        uc_api.tcg_flush_softmmu_tlb(self->uc);
    else
        self->owed[hart] = 1;
}

PyObject *engine_select(Engine *self, PyObject *args)
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

PyObject *engine_set_irq(Engine *self, PyObject *args)
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

PyObject *engine_owe_tlb_flush(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart))
        return NULL;
    flush_tlb(self, hart);
    Py_RETURN_NONE;
}

PyObject *engine_peek(Engine *self, PyObject *args)
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

PyObject *engine_poke(Engine *self, PyObject *args)
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

PyObject *engine_get_fflags(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart))
        return NULL;
    return PyLong_FromUnsignedLongLong(uc_api.riscv_cpu_get_fflags(env_of(self, hart)));
}

PyObject *engine_set_fflags(Engine *self, PyObject *args)
{
    int hart;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "iK", &hart, &value) || !good_hart(self, hart))
        return NULL;
    uc_api.riscv_cpu_set_fflags(env_of(self, hart), value & 31);
    Py_RETURN_NONE;
}

/* get_pmp(hart) -> bytes of 16 cfg, then 16 little-endian u64 addresses */
PyObject *engine_get_pmp(Engine *self, PyObject *args)
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

PyObject *engine_set_pmp(Engine *self, PyObject *args)
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
PyObject *engine_loaded(Engine *self, PyObject *args)
{
    int hart;
    if (!PyArg_ParseTuple(args, "i", &hart) || !good_hart(self, hart) || !not_running(self))
        return NULL;
    flush_tlb(self, hart);
    if (hart == self->current)
        rearm(self);
    Py_RETURN_NONE;
}
