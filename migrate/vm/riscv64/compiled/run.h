/* The run loop, its limits, and what may be asked of it. */
#ifndef RUN_H
#define RUN_H

#include "engine.h"

/* When the next look is due: the nearest of budget, deadline and requests. */
void set_limit(Engine *self);

/* Why the run should end here (END_*), or END_NONE. Takes the request that it answers. */
int due(Engine *self, uint64_t executed);

/* Hook of the engine: before each translated block. */
void on_block(void *uc, uint64_t address, uint32_t size, void *user);

#endif
