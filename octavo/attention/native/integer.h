// Products of rows with a page of integer codes, by products of bytes: where the processor has them they take half the time
// of product.h's in float32. Rows are first rounded to integers of two bytes; products of those with codes, and their sums,
// are exact, in int32.
#pragma once

#include "product.h"

namespace octavo::ISA {

// A row as integers, x ≈ step·integer.
struct IntegerRow {
    alignas(64) uint8_t high[LARGEST];  // of a query (int8): 128·high + low; of weights: 256·high + low
    alignas(64) uint8_t low[LARGEST];
    float step, sum;  // sum: of the integers
};

// The row's 15 bits are relative to its own largest value.
void round_query(const float* q, int dim, IntegerRow& row);

// The weights of a page's tokens, none of which is negative, as 16 bits relative to their own largest.
void round_weights(const float* weights, IntegerRow& row);

// As product.h's multiply, of rows that were rounded.
void multiply(const Side& side, const IntegerRow* rows, int count, const uint8_t* page, Bytes next, Range tokens, Matrix c,
              const float* keep);

}  // namespace octavo::ISA
