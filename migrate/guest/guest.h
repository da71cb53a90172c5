/* What start.S and guest.c share. The header's layout is also in migrate/vm/guest.py. */
#ifndef GUEST_H
#define GUEST_H

#define HEADER_OFFSET 0x40
#define HEADER_VERSION 1

#define FILL_ZERO 0
#define FILL_RANDOM 1
#define FILL_COMPRESSIBLE 2
#define ORDER_SEQUENTIAL 0
#define ORDER_RANDOM 1
#define VISIT_WORD 0
#define VISIT_PAGE 1
#define PACING_SPIN 0
#define PACING_WFI 1
#define PRIVILEGE_S 1
#define PRIVILEGE_M 3
#define CLOCK_MTIME 0
#define CLOCK_RDTIME 1

/* QEMU's `virt` board. */
#define RAM_BASE 0x80000000
#define FINISHER 0x00100000
#define MTIMECMP 0x02004000
#define MTIME 0x0200bff8
#define UART 0x10000000

#define MIP_STIP 0x20
#define MIP_MTIP 0x80
#define MSTATUS_SIE 0x2
#define MSTATUS_MIE 0x8
#define MSTATUS_MPP 0x1800
#define MSTATUS_MPP_S 0x800

#endif
