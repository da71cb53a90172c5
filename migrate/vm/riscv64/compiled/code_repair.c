/*
 * Repair of two functions of the engine that leave translated code stale: its own calls to them go
 * through its GOT, whose two entries are pointed here.
 */
#include "code_repair.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

static void **slot_fast, **slot_reset;
static bool repaired;
static ptrdiff_t env_in_cpu; /* learned when the engine first generates code */

/* A store to a page with translated code: the engine looks only at the bytes stored. */
static void whole_page(void *uc, void *pages, uint64_t start, int size, uintptr_t retaddr)
{
    uint64_t page = start & ~0xfffull;
    (void)pages;
    (void)size;
    (void)retaddr;
    uc_api.tb_invalidate_phys_page_range(uc, page, page + 0x1000);
}

/* New code in a page: the engine arms the writes through that virtual address only. */
static void every_alias(void *cpu, uint64_t start, uint64_t size)
{
    (void)start;
    (void)size;
    if (!env_in_cpu)
        for (Engine *engine = engines; engine; engine = engine->next)
            if ((char *)engine->env > (char *)cpu && (char *)engine->env - (char *)cpu < 1 << 18)
                env_in_cpu = (char *)engine->env - (char *)cpu;
    uc_api.tlb_reset_dirty_by_vaddr(cpu, 0, UINT64_MAX);
}

typedef struct {
    uintptr_t inside; /* an address in the wanted object */
} FindSlots;

static int find_slots(struct dl_phdr_info *info, size_t size, void *data)
{
    FindSlots *find = data;
    const ElfW(Dyn) *dynamic = NULL;
    bool inside = false;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + header->p_vaddr;
        if (header->p_type == PT_LOAD && find->inside >= start &&
            find->inside < start + header->p_memsz)
            inside = true;
        if (header->p_type == PT_DYNAMIC)
            dynamic = (const ElfW(Dyn) *)start;
    }
    if (!inside || !dynamic)
        return 0;
    const char *strings = NULL;
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Rela) *relocations = NULL;
    size_t n = 0;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        if (dynamic->d_tag == DT_STRTAB)
            strings = (const char *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_SYMTAB)
            symbols = (const ElfW(Sym) *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_JMPREL)
            relocations = (const ElfW(Rela) *)dynamic->d_un.d_ptr;
        else if (dynamic->d_tag == DT_PLTRELSZ)
            n = dynamic->d_un.d_val / sizeof(ElfW(Rela));
        else if (dynamic->d_tag == DT_PLTREL && dynamic->d_un.d_val != DT_RELA)
            return 1;
    }
    if (!strings || !symbols || !relocations)
        return 1;
    for (size_t i = 0; i < n; i++) {
        const char *name = strings + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
        void **slot = (void **)(info->dlpi_addr + relocations[i].r_offset);
        if (!strcmp(name, "tb_invalidate_phys_page_fast_riscv64"))
            slot_fast = slot;
        else if (!strcmp(name, "tlb_reset_dirty_by_vaddr_riscv64"))
            slot_reset = slot;
    }
    return 1;
}

static bool write_slot(void **slot, void *value)
{
    uintptr_t page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *page = (void *)((uintptr_t)slot & ~(page_size - 1));
    /* Left writable: the linker's lazy binding may want it so, and a page of it is shared. */
    if (mprotect(page, page_size, PROT_READ | PROT_WRITE))
        return false;
    *slot = value;
    return true;
}

void find_calls_to_repair(void)
{
    FindSlots find = {(uintptr_t)uc_api.tb_invalidate_phys_page_fast};
    dl_iterate_phdr(find_slots, &find);
}

bool code_was_generated(void)
{
    return env_in_cpu != 0;
}

void arm_writes_to_code(Engine *self)
{
    if (repaired)
        uc_api.tlb_reset_dirty_by_vaddr((char *)self->env - env_in_cpu, 0, UINT64_MAX);
}

/* set_code_repair(on): process-wide */
PyObject *set_code_repair(PyObject *module, PyObject *argument)
{
    int on = PyObject_IsTrue(argument);
    (void)module;
    if (on < 0)
        return NULL;
    if (!slot_fast || !slot_reset) {
        PyErr_SetString(PyExc_RuntimeError, "the engine does not call its functions by its GOT");
        return NULL;
    }
    if (on != repaired) {
        void *fast = on ? (void *)whole_page : (void *)uc_api.tb_invalidate_phys_page_fast;
        void *reset = on ? (void *)every_alias : (void *)uc_api.tlb_reset_dirty_by_vaddr;
        if (!write_slot(slot_fast, fast) || !write_slot(slot_reset, reset))
            return PyErr_SetFromErrno(PyExc_OSError);
        repaired = on;
    }
    Py_RETURN_NONE;
}
