/*
 * Guest memory as it is mapped, and precise access faults of stores beside it: after such a store
 * the engine would go on to the end of the block, so hooks raise the exception in its middle.
 */
#include "memory.h"
#include "code_repair.h"
#include "decode.h"
#include "methods.h"

const uint8_t *host_memory(const Engine *self, uint64_t gpa, uint64_t size)
{
    for (size_t i = 0; i < self->n_blocks; i++) {
        const Block *block = &self->blocks[i];
        if (gpa >= block->gpa && gpa - block->gpa < block->size &&
            block->size - (gpa - block->gpa) >= size)
            return block->hva + (gpa - block->gpa);
    }
    return NULL;
}

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

/* The engine does not arm writes to the page of new code (see code_repair.c) whose virtual address
 * lies within the bounds of a hook for physical ones. */
void on_generated(void *uc, GeneratedBlock *block, GeneratedBlock *before, void *user)
{
    Engine *self = user;
    (void)uc;
    (void)before;
    for (size_t i = 0; i < self->n_forbidden; i++)
        if (block->pc >= self->forbidden[i].first && block->pc <= self->forbidden[i].last) {
            arm_writes_to_code(self);
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

void forbid_stores(Engine *self)
{
    if (!self->forbidden_stale || !code_was_generated())
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

/* memory_mapped(gpa, size, hva, readonly): what there is of memory; hva 0 takes it out */
PyObject *engine_memory_mapped(Engine *self, PyObject *args)
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
