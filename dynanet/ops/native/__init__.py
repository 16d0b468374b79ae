"""Native kernels, compiled where a C compiler was there at install; torch runs where they are not."""
