"""The RISC-V core over Unicorn (layer 2)."""
