/* The methods of the Python type that module.c takes from the other files. */
#ifndef METHODS_H
#define METHODS_H

#include "engine.h"

/* run.c */
PyObject *engine_run(Engine *self, PyObject *args);
PyObject *engine_stop(Engine *self, PyObject *unused);
PyObject *engine_end_turn(Engine *self, PyObject *unused);
PyObject *engine_forget_code(Engine *self, PyObject *unused);
PyObject *engine_written(Engine *self, PyObject *args);
PyObject *engine_set_time(Engine *self, PyObject *args);
PyObject *engine_ticks(Engine *self, PyObject *unused);
PyObject *engine_stats(Engine *self, PyObject *unused);
PyObject *engine_set_async_stop(Engine *self, PyObject *argument);
PyObject *engine_stop_anywhere(Engine *self, PyObject *unused);

/* harts.c */
PyObject *engine_select(Engine *self, PyObject *args);
PyObject *engine_set_irq(Engine *self, PyObject *args);
PyObject *engine_owe_tlb_flush(Engine *self, PyObject *args);
PyObject *engine_peek(Engine *self, PyObject *args);
PyObject *engine_poke(Engine *self, PyObject *args);
PyObject *engine_get_fflags(Engine *self, PyObject *args);
PyObject *engine_set_fflags(Engine *self, PyObject *args);
PyObject *engine_get_pmp(Engine *self, PyObject *args);
PyObject *engine_set_pmp(Engine *self, PyObject *args);
PyObject *engine_loaded(Engine *self, PyObject *args);

/* memory.c */
PyObject *engine_memory_mapped(Engine *self, PyObject *args);

/* mmio.c */
PyObject *engine_map_mmio(Engine *self, PyObject *args);
PyObject *engine_window_shortcut(Engine *self, PyObject *args);
PyObject *engine_window_drain(Engine *self, PyObject *args);

#endif
