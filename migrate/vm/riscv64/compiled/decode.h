/* What the instruction that trapped wanted of memory. */
#ifndef DECODE_H
#define DECODE_H

#include "engine.h"

/* Is the instruction at pc an AMO or SC? */
bool stores_atomically(const Engine *self);

/* The address that the store at pc writes. */
uint64_t store_address(const Engine *self);

/* The address that the load at pc reads (its registers are still those before it). */
uint64_t load_address(const Engine *self);

#endif
