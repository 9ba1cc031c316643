"""Pure maths: interpolants, losses, guidance, samplers."""
