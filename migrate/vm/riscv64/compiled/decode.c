/*
 * What the instruction that trapped wanted of memory, where the engine does not say it, or says it
 * wrongly.
 */
#include "decode.h"
#include "memory.h"

/* Half an instruction, by a page walk of our own: the engine's could fault, which outside its main
 * loop is fatal. 0 (an illegal instruction) where there is none. */
static uint32_t fetch(const Engine *self, uint64_t address)
{
    const Env *env = self->env;
    const uint8_t *memory;
    uint16_t half;
    uint64_t mode = env->satp >> 60;
    if (env->priv != PRV_M && mode != 0) {
        uint64_t table = (env->satp & ((1ull << 44) - 1)) << 12, entry = 0;
        int level = (int)mode - 6; /* Sv39 is 8 */
        for (; level >= 0; level--) {
            memory = host_memory(self, table + (address >> (12 + 9 * level) & 511) * 8, 8);
            if (!memory)
                return 0;
            memcpy(&entry, memory, 8);
            table = (entry >> 10 & ((1ull << 44) - 1)) << 12;
            if (!(entry & 1))
                return 0;
            if (entry & 0xe)
                break;
        }
        if (level < 0)
            return 0;
        address = table | (address & ((1ull << (12 + 9 * level)) - 1));
    }
    memory = host_memory(self, address, 2);
    if (!memory)
        return 0;
    memcpy(&half, memory, 2);
    return half;
}

static bool is_atomic(uint32_t insn)
{
    return (insn & 0x7f) == 0x2f; /* has no offset */
}

bool stores_atomically(const Engine *self)
{
    uint64_t pc = self->env->pc;
    return is_atomic(fetch(self, pc)) && fetch(self, pc + 2) >> 11 != 2;
}

/* Of c.lw, c.sw, c.fld, c.ld, c.fsd and c.sd. */
static uint64_t compressed_address(const Env *env, uint32_t insn)
{
    uint64_t base = env->gpr[8 + (insn >> 7 & 7)];
    uint32_t high = insn >> 7 & 0x38;
    if ((insn >> 13 & 3) == 2)
        return base + (high | (insn >> 4 & 4) | (insn << 1 & 0x40));
    return base + (high | (insn << 1 & 0xc0));
}

uint64_t store_address(const Engine *self)
{
    const Env *env = self->env;
    uint32_t insn = fetch(self, env->pc);
    switch (insn & 3) {
    case 3: {
        insn |= fetch(self, env->pc + 2) << 16;
        uint64_t base = env->gpr[insn >> 15 & 31];
        int64_t high = (int32_t)insn >> 25;
        return is_atomic(insn) ? base : base + (uint64_t)(high * 32) + (insn >> 7 & 31);
    }
    case 0:
        return compressed_address(env, insn);
    default: /* c.fsdsp, c.swsp, c.sdsp */
        if ((insn >> 13 & 3) == 2)
            return env->gpr[2] + ((insn >> 7 & 0x3c) | (insn >> 1 & 0xc0));
        return env->gpr[2] + ((insn >> 7 & 0x38) | (insn >> 1 & 0x1c0));
    }
}

uint64_t load_address(const Engine *self)
{
    const Env *env = self->env;
    uint32_t insn = fetch(self, env->pc);
    switch (insn & 3) {
    case 3: {
        insn |= fetch(self, env->pc + 2) << 16;
        uint64_t base = env->gpr[insn >> 15 & 31];
        return is_atomic(insn) ? base : base + (uint64_t)(int64_t)((int32_t)insn >> 20);
    }
    case 0:
        return compressed_address(env, insn);
    default: /* c.fldsp, c.lwsp, c.ldsp */
        if ((insn >> 13 & 3) == 2)
            return env->gpr[2] + ((insn >> 7 & 0x20) | (insn >> 2 & 0x1c) | (insn << 4 & 0xc0));
        return env->gpr[2] + ((insn >> 7 & 0x20) | (insn >> 2 & 0x18) | (insn << 4 & 0x1c0));
    }
}
