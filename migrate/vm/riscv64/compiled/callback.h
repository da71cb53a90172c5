/* Calls of Python functions in the middle of a run, which goes on without the GIL. */
#ifndef CALLBACK_H
#define CALLBACK_H

#include "engine.h"

/* A callback raised: the run ends at the next boundary, and run() raises it. */
static inline void take_python_error(Engine *self)
{
    if (!self->error_type)
        PyErr_Fetch(&self->error_type, &self->error_value, &self->error_trace);
    else
        PyErr_Clear();
    ask(self, ASK_RAISED);
}

static inline void gil_take(Engine *self)
{
    PyEval_RestoreThread(self->thread);
}

static inline void gil_drop(Engine *self)
{
    self->thread = PyEval_SaveThread();
    if (self->deadline_ns)
        atomic_store(&self->limit, 0); /* Python took its time: look at the clock */
}

#endif
