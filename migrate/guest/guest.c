/* The guest of the tests, the benchmarks and the default demo.
 *
 * It fills its RAM with contents that can be derived again from page number and seed, dirties a
 * working set at a given rate, checks at each visit that the page still holds what the visit
 * before wrote, and prints a heartbeat line every period. Bytes received on the UART ask for more:
 * 'v' verify all RAM, 'p' parameters, 's' statistics, 'q' power off. See migrate/vm/guest.py for
 * the parameters and the lines.
 *
 * It runs in machine mode, or (default) sets up page tables and drops to supervisor mode: memory
 * that is writable but not executable is stored to much faster by translating emulators.
 */

#include "guest.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE_SIZE 4096UL
#define WORDS (PAGE_SIZE / 8)
#define TICKS_PER_S 10000000UL
#define TICKS_PER_MS (TICKS_PER_S / 1000)
#define NO_PAGE (~0UL)
#define ALWAYS_INLINE static inline __attribute__((always_inline))

struct header {
    u8 magic[8];
    u32 version, header_bytes;
    u64 ram_bytes, seed, fill;
    u64 working_set_pages, working_set_first;
    u64 rate_pages_per_s, order, visit, pacing, privilege, clock;
    u64 heartbeat_ticks, stop_after_heartbeats, stop_after_visits, spin_rounds;
};

/* Patched by the host before the guest runs: the compiler must not know what it holds. */
extern const volatile struct header header;
extern u8 _start[], _text_end[], _bss_end[];

static u64 root_table[512] __attribute__((aligned(4096)));
static u64 middle_table[512] __attribute__((aligned(4096)));
static u64 leaf_table[512] __attribute__((aligned(4096)));

u64 timer_fired; /* counted by the trap handlers in start.S */

static u64 device_tree;
static u32 *visit_counts; /* one a page of the working set */
static u64 fill_first, fill_end, set_first, set_pages; /* page numbers: address / 4096 */
static u64 visits, wrong_visits, first_wrong, next_in_order, random_state;
static u64 beats, code_sum, sleeps, max_late_ticks;
static u64 hole; /* the longest time between two looks at the clock since the last beat */

/* -- console -------------------------------------------------------------------------------- */

static char line[256];
static u64 line_length;

ALWAYS_INLINE u8 uart_read(u64 reg) { return *(volatile u8 *)(UART + reg); }
ALWAYS_INLINE void uart_write(u64 reg, u8 value) { *(volatile u8 *)(UART + reg) = value; }

static void put(const char *text)
{
    while (*text && line_length < sizeof line)
        line[line_length++] = *text++;
}

static void put_number(const char *key, u64 value)
{
    char digits[20];
    u64 n = 0;

    put(key);
    do
        digits[n++] = '0' + value % 10;
    while (value /= 10);
    while (n && line_length < sizeof line)
        line[line_length++] = digits[--n];
}

static void put_hex(const char *key, u64 value)
{
    put(key);
    for (int shift = 60; shift >= 0 && line_length < sizeof line; shift -= 4)
        line[line_length++] = "0123456789abcdef"[value >> shift & 15];
}

/* The transmitter's FIFO takes 16 bytes at once: one look at the line status for each lot. */
static void send_line(void)
{
    put("\n");
    for (u64 i = 0; i < line_length;) {
        while (!(uart_read(5) & 0x20))
            ;
        for (u64 end = i + 16; i < end && i < line_length; i++)
            uart_write(0, line[i]);
    }
    line_length = 0;
}

static void __attribute__((noreturn)) power_off(int failed)
{
    *(volatile u32 *)FINISHER = failed ? 0x13333 : 0x5555;
    for (;;)
        __asm__ volatile("wfi");
}

void __attribute__((noreturn)) report_trap(u64 cause, u64 epc, u64 tval, u64 privilege)
{
    line_length = 0;
    put_hex("\nTRAP cause=0x", cause);
    put_hex(" epc=0x", epc);
    put_hex(" tval=0x", tval);
    put_number(" privilege=", privilege);
    send_line();
    power_off(1);
}

/* -- time ------------------------------------------------------------------------------------ */

ALWAYS_INLINE u64 now(void)
{
    u64 ticks;

    if (header.clock == CLOCK_RDTIME) {
        __asm__ volatile("rdtime %0" : "=r"(ticks) : : "memory");
        return ticks;
    }
    return *(volatile u64 *)MTIME;
}

/* Take the core for some microseconds. The body is long so that emulators spend the time in
 * arithmetic and not in what they do between blocks. */
static void spin(u64 rounds)
{
    u64 x = rounds;

    while (rounds--)
        __asm__ volatile(".rept 16\n\txori %0, %0, 0x55\n\taddi %0, %0, 3\n\t.endr" : "+r"(x));
}

static void sleep_until(u64 deadline)
{
    u64 before = timer_fired;

    sleeps++;
    if (header.privilege == PRIVILEGE_S) {
        register u64 a0 __asm__("a0") = deadline;
        register u64 a7 __asm__("a7") = 0;

        __asm__ volatile("ecall" : : "r"(a0), "r"(a7) : "memory");
        __asm__ volatile("csrs sie, %0" : : "r"(MIP_STIP) : "memory");
        while (*(volatile u64 *)&timer_fired == before) {
            __asm__ volatile("wfi" : : : "memory");
            __asm__ volatile("csrsi sstatus, %0" : : "i"(MSTATUS_SIE) : "memory");
            __asm__ volatile("csrci sstatus, %0" : : "i"(MSTATUS_SIE) : "memory");
        }
    } else {
        *(volatile u64 *)MTIMECMP = deadline;
        __asm__ volatile("csrs mie, %0" : : "r"(MIP_MTIP) : "memory");
        while (*(volatile u64 *)&timer_fired == before) {
            __asm__ volatile("wfi" : : : "memory");
            __asm__ volatile("csrsi mstatus, %0" : : "i"(MSTATUS_MIE) : "memory");
            __asm__ volatile("csrci mstatus, %0" : : "i"(MSTATUS_MIE) : "memory");
        }
    }
}

/* -- contents -------------------------------------------------------------------------------- */

ALWAYS_INLINE u64 mix(u64 z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

#define STEP(x) ((x) * 0x5851f42d4c957f2d + 0x14057b7ef767814f)
#define OUTPUT(x) ((x) ^ (x) >> 32)
#define VISIT_STEP 0x9e3779b97f4a7c15

/* What a page is filled with starts here: a 64-bit LCG, its high half folded onto the low one. */
ALWAYS_INLINE u64 fill_state(u64 page) { return mix(header.seed + page * 0x9e3779b97f4a7c15); }

/* What visit number `count` (from 1) writes into a page: this word, or a sequence from it. */
ALWAYS_INLINE u64 visit_value(u64 page, u64 count)
{
    return mix(header.seed ^ page << 36 ^ count);
}

/* The one word of a page that word visits write. */
ALWAYS_INLINE u64 visit_word(u64 page) { return mix(page) % WORDS; }

ALWAYS_INLINE u64 *page_words(u64 page) { return (u64 *)(page * PAGE_SIZE); }

static u64 fill_word(u64 page, u64 index)
{
    u64 x = fill_state(page);

    if (header.fill == FILL_ZERO)
        return 0;
    if (header.fill == FILL_COMPRESSIBLE)
        index %= WORDS / 4;
    while (index--)
        x = STEP(x);
    return OUTPUT(x);
}

static void fill_page(u64 page)
{
    u64 *p = page_words(page), x = fill_state(page);

    if (header.fill == FILL_RANDOM) {
        for (u64 *end = p + WORDS; p != end; p += 16) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++, x = STEP(x))
                p[i] = OUTPUT(x);
        }
    } else { /* one quarter random, four times: ratio 4 for any compressor that sees the page */
        for (u64 *end = p + WORDS / 4; p != end; p += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, x = STEP(x))
                p[i] = p[i + WORDS / 4] = p[i + WORDS / 2] = p[i + 3 * WORDS / 4] = OUTPUT(x);
        }
    }
}

#define DIGEST(d, word) ((d) * 0xd6e8feb86659fd93 + (word))

/* Compares a page with its fill, but for the word `skip`, which must hold `instead`. */
static int fill_intact(u64 page, u64 skip, u64 instead, u64 *digest)
{
    u64 *p = page_words(page), x = fill_state(page), d = *digest, wrong = 0, kept = 0;

    if (skip != NO_PAGE) { /* put the fill's word there for the comparison */
        kept = p[skip];
        wrong = kept ^ instead;
        d = DIGEST(d, kept);
    }
#define EXPECT(i, value)                                                                           \
    do {                                                                                           \
        u64 word = p[i];                                                                           \
        u64 off = word ^ (value);                                                                  \
        d = DIGEST(d, word);                                                                       \
        wrong |= off;                                                                              \
    } while (0)
    if (skip != NO_PAGE) {
        for (u64 i = 0; i < WORDS; i++) {
            u64 value = header.fill == FILL_ZERO ? 0 : OUTPUT(x);
            x = header.fill == FILL_COMPRESSIBLE && i % (WORDS / 4) == WORDS / 4 - 1
                    ? fill_state(page)
                    : STEP(x);
            if (i != skip)
                EXPECT(i, value);
        }
    } else if (header.fill == FILL_ZERO) {
        for (u64 *end = p + WORDS; p != end; p += 16) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                wrong |= p[i];
        }
        d = DIGEST(d, wrong);
    } else {
        u64 stretch = header.fill == FILL_COMPRESSIBLE ? WORDS / 4 : WORDS;

        for (u64 *end = p + WORDS; p != end;) {
            x = fill_state(page);
            for (u64 *pause = p + stretch; p != pause; p += 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++, x = STEP(x))
                    EXPECT(i, OUTPUT(x));
            }
        }
    }
    *digest = d;
    return wrong == 0;
}

static int sequence_intact(u64 page, u64 value, u64 *digest)
{
    u64 *p = page_words(page), d = *digest, wrong = 0;

    for (u64 *end = p + WORDS; p != end; p += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++, value += VISIT_STEP)
            EXPECT(i, value);
    }
    *digest = d;
    return wrong == 0;
}

static void write_sequence(u64 page, u64 value)
{
    u64 *p = page_words(page);

    for (u64 *end = p + WORDS; p != end; p += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++, value += VISIT_STEP)
            p[i] = value;
    }
}

/* Does the page hold what it should, after `count` visits? */
static int page_intact(u64 page, u64 count, u64 *digest)
{
    if (count == 0)
        return fill_intact(page, NO_PAGE, 0, digest);
    if (header.visit == VISIT_PAGE)
        return sequence_intact(page, visit_value(page, count), digest);
    return fill_intact(page, visit_word(page), visit_value(page, count), digest);
}

/* -- work ------------------------------------------------------------------------------------ */

static void visit_one(void)
{
    u64 index, page, count, unused = 0;
    int intact;

    if (header.order == ORDER_SEQUENTIAL) {
        index = next_in_order;
        next_in_order = index + 1 == set_pages ? 0 : index + 1;
    } else {
        random_state = STEP(random_state);
        index = (random_state >> 32) * set_pages >> 32;
    }
    page = set_first + index;
    count = visit_counts[index];
    if (header.visit == VISIT_WORD) {
        u64 word = visit_word(page), *p = page_words(page) + word;

        intact = *p == (count ? visit_value(page, count) : fill_word(page, word));
        *p = visit_value(page, count + 1);
    } else {
        intact = page_intact(page, count, &unused);
        write_sequence(page, visit_value(page, count + 1));
    }
    visit_counts[index] = count + 1;
    visits++;
    if (!intact) {
        if (wrong_visits++ == 0)
            first_wrong = page;
    }
}

/* -- reports --------------------------------------------------------------------------------- */

static u64 sum_of_code(void)
{
    u64 d = 0;

    for (u64 *p = (u64 *)_start; p != (u64 *)_text_end; p++)
        d = DIGEST(d, *p);
    return d;
}

/* Derives all of RAM again. Returns the number of wrong pages. */
static u64 verify(void)
{
    u64 wrong = 0, first = NO_PAGE, digest = 0, started = now();
    int code_intact = sum_of_code() == code_sum;

    for (u64 page = fill_first; page != fill_end; page++) {
        u64 index = page - set_first, count = index < set_pages ? visit_counts[index] : 0;

        digest = DIGEST(digest, count);
        if (!page_intact(page, count, &digest)) {
            if (wrong++ == 0)
                first = page;
        }
    }
    put_number("VERIFY pages=", fill_end - fill_first);
    put_number(" wrong=", wrong);
    put_hex(" first=0x", first == NO_PAGE ? 0 : first * PAGE_SIZE);
    put_hex(" digest=0x", digest);
    put_number(" code=", code_intact);
    put_number(" visits=", visits);
    put_number(" wrong_visits=", wrong_visits);
    put_number(" ticks=", now() - started);
    send_line();
    return wrong + wrong_visits + !code_intact;
}

static void print_parameters(void)
{
    put_number("PARAMETERS version=", header.version);
    put_number(" ram=", header.ram_bytes);
    put_number(" seed=", header.seed);
    put_number(" fill=", header.fill);
    put_number(" set=", header.working_set_pages);
    put_number(" at=", header.working_set_first);
    put_number(" rate=", header.rate_pages_per_s);
    put_number(" order=", header.order);
    put_number(" visit=", header.visit);
    put_number(" pacing=", header.pacing);
    put_number(" privilege=", header.privilege);
    put_number(" clock=", header.clock);
    put_number(" period=", header.heartbeat_ticks);
    send_line();
}

static void print_statistics(void)
{
    put_number("STATISTICS beats=", beats);
    put_number(" t=", now());
    put_number(" visits=", visits);
    put_number(" wrong=", wrong_visits);
    put_hex(" first=0x", first_wrong * PAGE_SIZE);
    put_number(" sleeps=", sleeps);
    put_number(" wakes=", timer_fired);
    put_number(" max_late=", max_late_ticks);
    send_line();
}

static void finish(void)
{
    u64 wrong = verify();

    put("BYE");
    send_line();
    power_off(wrong != 0);
}

static void serve_requests(void)
{
    while (uart_read(5) & 1) {
        switch (uart_read(0)) {
        case 'v':
            verify();
            break;
        case 'p':
            print_parameters();
            break;
        case 's':
            print_statistics();
            break;
        case 'q':
            put("BYE");
            send_line();
            power_off(0);
        }
    }
}

static void heartbeat(u64 t, u64 late, u64 dirtied)
{
    if (late > max_late_ticks)
        max_late_ticks = late;
    put_number("HB n=", ++beats);
    put_number(" t=", t);
    put_number(" visits=", visits);
    put_number(" wrong=", wrong_visits);
    put_number(" dirtied=", dirtied);
    put_number(" late=", late);
    put_number(" hole=", hole);
    send_line();
    hole = 0;
}

/* -- the course of things -------------------------------------------------------------------- */

#define PTE_POINTER 0x01
#define PTE_RX 0xcb /* dirty, accessed, executable, readable, valid */
#define PTE_RW 0xc7

/* Called in machine mode. Returns the satp to use, or 0 to stay in machine mode. */
u64 machine_setup(u64 dtb)
{
    device_tree = dtb;
    if (header.privilege != PRIVILEGE_S)
        return 0;
    root_table[0] = PTE_RW; /* devices */
    root_table[2] = ((u64)middle_table >> 2) | PTE_POINTER;
    middle_table[0] = ((u64)leaf_table >> 2) | PTE_POINTER;
    for (u64 i = 0; i < 512; i++) {
        u64 address = RAM_BASE + i * PAGE_SIZE;

        leaf_table[i] = address >> 2 | (address < (u64)_text_end ? PTE_RX : PTE_RW);
        if (i)
            middle_table[i] = (RAM_BASE + (i << 21)) >> 2 | PTE_RW;
    }
    for (u64 i = 3; i < 256 && (i - 2) << 30 < header.ram_bytes; i++)
        root_table[i] = (i << 30) >> 2 | PTE_RW;
    return 8UL << 60 | (u64)root_table >> 12;
}

static void clear(u64 from, u64 end)
{
    for (u64 *p = (u64 *)from; p < (u64 *)end; p++)
        if (*p) /* do not dirty what is zero already */
            *p = 0;
}

/* RAM is zero when the machine starts, but for the device tree that the board may have put there.
 * QEMU leaves more behind it than the tree says that it holds. */
static void clear_device_tree(void)
{
    u64 end = RAM_BASE + header.ram_bytes, start = device_tree & -PAGE_SIZE;

    if (device_tree < (u64)_bss_end || device_tree >= end)
        return;
    if (end - start > 64 * 1024)
        end = start + 64 * 1024;
    clear(start, end);
}

static void lay_out_and_fill(void)
{
    u64 address = (u64)_bss_end;

    set_pages = header.working_set_pages;
    visit_counts = (u32 *)address;
    address += set_pages * sizeof *visit_counts;
    fill_first = (address + PAGE_SIZE - 1) / PAGE_SIZE;
    fill_end = (RAM_BASE + header.ram_bytes) / PAGE_SIZE;
    set_first = fill_first + header.working_set_first;
    if (set_first + set_pages > fill_end) {
        put("REFUSED the working set does not fit into RAM");
        send_line();
        power_off(1);
    }
    random_state = mix(~header.seed);
    code_sum = sum_of_code();
    if (header.fill == FILL_ZERO)
        clear_device_tree();
    clear((u64)visit_counts, fill_first * PAGE_SIZE);
    if (header.fill != FILL_ZERO)
        for (u64 page = fill_first; page != fill_end; page++)
            fill_page(page);
}

void worker(void)
{
    u64 started, t, before, due, requests_at, base, base_visits, last_visits = 0;
    u64 lot = header.visit == VISIT_PAGE ? 4 : 64; /* visits between two looks at the clock */

    uart_write(1, 0); /* no interrupts */
    uart_write(2, 1); /* FIFO on */
    put("GUEST migrate");
    send_line();
    print_parameters();
    started = now();
    lay_out_and_fill();
    t = now();
    put_number("FILLED pages=", fill_end - fill_first);
    put_hex(" from=0x", fill_first * PAGE_SIZE);
    put_number(" ticks=", t - started);
    send_line();

    t = now();
    due = t + header.heartbeat_ticks;
    requests_at = t;
    base = t;
    base_visits = 0;
    for (;;) {
        if (t >= due) {
            u64 late = t - due;

            heartbeat(t, late, visits - last_visits);
            last_visits = visits;
            due += header.heartbeat_ticks * (1 + late / header.heartbeat_ticks);
            if (header.stop_after_heartbeats && beats >= header.stop_after_heartbeats)
                finish();
        }
        if (t >= requests_at) {
            serve_requests();
            requests_at = t + TICKS_PER_MS;
        }
        if (set_pages) {
            u64 todo = lot;

            if (header.rate_pages_per_s) {
                u64 behind =
                    (t - base) * header.rate_pages_per_s / TICKS_PER_S - (visits - base_visits);

                if (behind > lot) { /* time was lost: catch up with at most one lot a look */
                    if (behind > lot + header.rate_pages_per_s / 10) {
                        base = t;
                        base_visits = visits;
                    }
                } else
                    todo = behind;
            }
            for (; todo; todo--) {
                visit_one();
                if (visits == header.stop_after_visits)
                    finish();
            }
        }
        if (!set_pages || header.rate_pages_per_s) {
            if (header.pacing == PACING_WFI) {
                u64 wake = t + TICKS_PER_MS;

                sleep_until(set_pages && wake < due ? wake : due);
            } else
                spin(header.spin_rounds);
        }
        before = t;
        t = now();
        if (t - before > hole)
            hole = t - before;
    }
}
