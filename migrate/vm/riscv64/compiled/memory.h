/* Guest memory, and the stores that miss it. */
#ifndef MEMORY_H
#define MEMORY_H

#include "engine.h"

typedef struct {
    uint64_t pc;
    uint16_t instructions, size;
} GeneratedBlock;

/* Where `size` bytes of guest memory lie here, or NULL. */
const uint8_t *host_memory(const Engine *self, uint64_t gpa, uint64_t size);

/* Between two runs: hooks around the memory as it is now. */
void forbid_stores(Engine *self);

/* Hook of the engine: a block was translated. */
void on_generated(void *uc, GeneratedBlock *block, GeneratedBlock *before, void *user);

#endif
