// Compiled once per instruction set; PAG_INSTRUCTION_SET names the one of this copy.
#include "digits.h"
#include "rows.h"
#include "strided.h"

#define PAG_JOIN(A, B) A##B
#define PAG_TABLE(SET) PAG_JOIN(pag_kernels_, SET)
#define PAG_TEXT(SET) #SET
#define PAG_NAME(SET) PAG_TEXT(SET)

extern const pag_kernels PAG_TABLE(PAG_INSTRUCTION_SET);
const pag_kernels PAG_TABLE(PAG_INSTRUCTION_SET) = {
    PAG_NAME(PAG_INSTRUCTION_SET), expands, TILE, TALL_TILE, slim_tile, convolution,
    convolution_of_digits, winograd, strided, layer_norm, mean, interpolate, decide, list_pixels, pool,
    activate, resize, moments, rescale,
};
