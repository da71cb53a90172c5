/* Exceptions of the guest. */
#ifndef TRAPS_H
#define TRAPS_H

#include "engine.h"

/* Hooks of the engine: an exception; an instruction that it does not know (ebreak). */
void on_interrupt(void *uc, uint32_t cause, void *user);
bool on_invalid(void *uc, void *user);

/* The engine left with an error: true if it was the guest's own, which is delivered now. */
bool access_fault(Engine *self, int error);

#endif
