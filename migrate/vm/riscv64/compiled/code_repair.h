/* Stores to translated code, and code that lies under several addresses: see code_repair.c. */
#ifndef CODE_REPAIR_H
#define CODE_REPAIR_H

#include "engine.h"

/* Where the engine calls the two functions from; once, when the API is bound. */
void find_calls_to_repair(void);

/* Has this process generated code, so that arm_writes_to_code knows its way? */
bool code_was_generated(void);

/* Have every write look for translated code again; nothing while the repair is off. */
void arm_writes_to_code(Engine *self);

PyObject *set_code_repair(PyObject *module, PyObject *argument);

#endif
