/* CSRs answered by the extension. */
#ifndef CSRS_H
#define CSRS_H

#include "engine.h"

void install_csrs(void);

/* Where an engine keeps its environment: the CSR functions are handed it. NULL if not as known. */
Env *find_env(void *uc);

#endif
