/* Windows of devices. */
#ifndef MMIO_H
#define MMIO_H

#include "engine.h"

/* The garbage collector's way to the callbacks of an engine's devices. */
int visit_windows(PyObject *devices, visitproc visit, void *arg);

#endif
