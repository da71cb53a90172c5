/* Entry, parameter header and trap vectors of the guest. Everything else is in guest.c. */

#include "guest.h"

    .section .text.start, "ax"
    .globl _start
_start:
    j       boot

/* The host patches the parameters into the image; migrate/vm/guest.py has the same layout. */
    .org    HEADER_OFFSET
    .globl  header
header:
    .ascii  "MIGGUEST"
    .word   HEADER_VERSION
    .word   header_end - header
    .dword  128 << 20           /* ram_bytes */
    .dword  1                   /* seed */
    .dword  FILL_RANDOM         /* fill */
    .dword  0                   /* working_set_pages */
    .dword  0                   /* working_set_first */
    .dword  0                   /* rate_pages_per_s */
    .dword  ORDER_SEQUENTIAL    /* order */
    .dword  VISIT_WORD          /* visit */
    .dword  PACING_SPIN         /* pacing */
    .dword  PRIVILEGE_S         /* privilege */
    .dword  CLOCK_MTIME         /* clock */
    .dword  100000              /* heartbeat_ticks */
    .dword  0                   /* stop_after_heartbeats */
    .dword  0                   /* stop_after_visits */
    .dword  1500                /* spin_rounds */
header_end:

boot:
    csrr    t0, mhartid
    bnez    t0, park
    csrw    mie, zero
    la      t0, machine_trap
    csrw    mtvec, t0
    la      sp, main_stack_top
    la      t0, _bss
    la      t1, _bss_end
1:  sd      zero, 0(t0)
    addi    t0, t0, 8
    bltu    t0, t1, 1b
    mv      a0, a1              /* the device tree, if the board left one */
    call    machine_setup       /* page tables; returns the satp to use, or 0 to stay in M */
    beqz    a0, worker_in_machine_mode

    /* Other privileges than M may touch nothing until a PMP entry allows it. */
    li      t0, -1
    csrw    pmpaddr0, t0
    li      t0, 0x1f            /* NAPOT, R W X */
    csrw    pmpcfg0, t0
    li      t0, 7
    csrw    mcounteren, t0      /* rdtime */
    csrw    medeleg, zero       /* no exception is expected in S either: M reports it */
    li      t0, MIP_STIP
    csrw    mideleg, t0
    la      t0, supervisor_trap
    csrw    stvec, t0
    csrw    satp, a0
    sfence.vma
    li      t0, MSTATUS_MPP
    csrc    mstatus, t0
    li      t0, MSTATUS_MPP_S
    csrs    mstatus, t0
    la      t0, worker
    csrw    mepc, t0
    mret

worker_in_machine_mode:
    call    worker
park:
    csrw    mie, zero
1:  wfi
    j       1b

/* Machine traps: the timer, and supervisor calls (a7 = 0: arm the timer for a0, 1: report a trap
   taken in S whose scause, sepc, stval are a0..a2). Anything else is reported as fatal. */
    .balign 4
machine_trap:
    csrw    mscratch, t0
    csrr    t0, mcause
    bltz    t0, machine_interrupt
    addi    t0, t0, -9          /* ecall from S */
    bnez    t0, fatal
    beqz    a7, arm_timer
    li      t0, 1
    bne     a7, t0, fatal
    la      sp, trap_stack_top
    li      a3, 1
    call    report_trap

arm_timer:
    li      t0, MTIMECMP
    sd      a0, 0(t0)
    li      t0, MIP_STIP
    csrc    mip, t0
    li      t0, MIP_MTIP
    csrs    mie, t0
    csrr    t0, mepc
    addi    t0, t0, 4
    csrw    mepc, t0
    csrr    t0, mscratch
    mret

machine_interrupt:
    slli    t0, t0, 1           /* drop the interrupt bit */
    addi    t0, t0, -(7 << 1)
    bnez    t0, fatal
    li      t0, MIP_MTIP
    csrc    mie, t0
    csrr    t0, mideleg         /* other bits may be fixed to one */
    andi    t0, t0, MIP_STIP
    beqz    t0, 1f
    csrs    mip, t0             /* forward it to S as STIP */
    csrr    t0, mscratch
    mret
1:  csrr    t0, mscratch
    addi    sp, sp, -16         /* worker in M: its stack is valid here */
    sd      t0, 0(sp)
    sd      t1, 8(sp)
    la      t0, timer_fired
    ld      t1, 0(t0)
    addi    t1, t1, 1
    sd      t1, 0(t0)
    ld      t0, 0(sp)
    ld      t1, 8(sp)
    addi    sp, sp, 16
    mret

fatal:
    csrr    a0, mcause
    csrr    a1, mepc
    csrr    a2, mtval
    csrr    a3, mstatus
    srli    a3, a3, 11
    andi    a3, a3, 3
    la      sp, trap_stack_top
    call    report_trap

    .balign 4
supervisor_trap:
    addi    sp, sp, -16
    sd      t0, 0(sp)
    sd      t1, 8(sp)
    csrr    t0, scause
    slli    t1, t0, 1
    addi    t1, t1, -(5 << 1)
    bgez    t0, 1f
    bnez    t1, 1f
    li      t0, MIP_STIP
    csrc    sie, t0
    la      t0, timer_fired
    ld      t1, 0(t0)
    addi    t1, t1, 1
    sd      t1, 0(t0)
    ld      t0, 0(sp)
    ld      t1, 8(sp)
    addi    sp, sp, 16
    sret
1:  csrr    a0, scause
    csrr    a1, sepc
    csrr    a2, stval
    li      a7, 1
    ecall

    .bss
    .balign 16
    .space  8192
main_stack_top:
    .space  4096
trap_stack_top:
