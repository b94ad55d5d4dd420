// The kernels of one instruction set against the portable ones, on random inputs of every codec and awkward shapes: the
// same codes bit for bit, the same answers within rounding. Compiled by test_native_build.py, with sanitizers for this
// processor and for others under an emulator. Memory is allocated to the byte, so that a sanitizer sees every read.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernel.h"

namespace octavo::portable { extern const Kernels kernels; }
namespace octavo::TESTED { extern const Kernels kernels; }

using namespace octavo;

namespace {

std::mt19937 random_source(0);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_source); }
float normal() { return std::normal_distribution<float>()(random_source); }
std::vector<float> normals(size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal();
    return x;
}

int32_t run_inline(int64_t begin, int64_t end, int64_t, Task task, void* context) {
    for (int64_t i = begin; i < end; i++) task(i, i + 1, context);
    return 0;
}
const Pool POOL{run_inline, 3};

struct Tables {
    std::vector<float> scale, reciprocal, limit;
    explicit Tables(float levels) {
        for (int e = 0; e < 256; e++) {
            const double absmax = std::exp2((e + 1) / 16.0 - 6);
            scale.push_back(float(absmax / levels));
            reciprocal.push_back(float(levels / absmax));
            limit.push_back(scale.back() * levels);
        }
    }
};
const Tables EIGHT(127), FOUR(8);

struct Store {
    Side side;
    std::vector<uint8_t> codes, scales;
    std::vector<float> mu, c, reciprocal;
    int64_t saturated = 0;

    Store(Code code, bool token, bool rotated, bool is_k, int heads, int dim, int blocks)
        : mu(normals(size_t(heads) * dim)), c(mu.size(), 0.05f), reciprocal(mu.size(), 1 / 0.05f) {
        const int bytes[] = {2 * dim, 2 * dim, 4 * dim, dim, dim / 2};
        const int64_t head_bytes = int64_t(BLOCK) * bytes[int(code)];
        const int width = code == Code::INT4 ? dim / 2 : dim;
        const int slack = !is_k && width % 16 ? 64 : 0;  // as Layout.allocate
        codes.resize(head_bytes * heads * blocks + slack);
        scales.resize(size_t(blocks) * heads * BLOCK);
        const bool raw = int(code) < 3;
        const Tables& table = code == Code::INT4 ? FOUR : EIGHT;
        side = {code, heads, dim, is_k, rotated, codes.data(), token ? scales.data() : nullptr,
                raw ? nullptr : mu.data(), c.data(), reciprocal.data(), table.scale.data(), table.reciprocal.data(),
                table.limit.data(), head_bytes, &saturated};
    }
};

// Numbers of a 16-bit type between 1/64 and 4, as bits; and what such bits stand for.
uint16_t random_bits(Float type) {
    const int sign = pick(0, 1) << 15;
    return uint16_t(type == Float::BF16 ? sign | pick(121, 128) << 7 | pick(0, 127)
                                        : sign | pick(9, 16) << 10 | pick(0, 1023));
}
float from_bits(Float type, uint16_t bits) {
    const int mantissa_bits = type == Float::BF16 ? 7 : 10, bias = type == Float::BF16 ? 127 : 15, one = 1 << mantissa_bits;
    const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits % one;
    const float x = std::ldexp(float(exponent ? one + mantissa : mantissa), std::max(exponent, 1) - bias - mantissa_bits);
    return bits >> 15 ? -x : x;
}

struct Answer {
    std::vector<uint8_t> k_codes, v_codes;
    std::vector<float> exact, by_bytes;  // attention in float32, and of single new tokens by products of bytes
    int64_t saturated;
};

struct Input {
    Code k_code, v_code;
    bool k_token, v_token, k_rotated, v_rotated;
    int heads, group, k_dim, v_dim;
    std::vector<int64_t> kv_len, fresh;  // of each sequence: its tokens, and how many of them are new
    int span;  // of edges, 0: none
    Float type;  // of queries and answers
    Attention attention;
};

Answer run(const Kernels& kernels, const Input& in, unsigned seed) {
    random_source.seed(seed);
    const int sequences = int(in.kv_len.size());
    int64_t blocks = 1, width = 1;  // block 0 is nobody's: where a table is longer than its sequence
    for (int64_t tokens : in.kv_len) {
        const int64_t own = (tokens + BLOCK - 1) / BLOCK;
        blocks += own, width = std::max(width, own);
    }
    std::vector<int64_t> table(sequences * width), q_start(1), slots;
    int64_t free = blocks;
    for (int s = 0; s < sequences; s++) {
        q_start.push_back(q_start.back() + in.fresh[s]);
        for (int64_t t = 0; t < in.kv_len[s]; t++) {
            int64_t& block = table[s * width + t / BLOCK];
            if (t % BLOCK == 0) block = --free;
            slots.push_back(block * BLOCK + t % BLOCK);
        }
        slots.push_back(-1);
    }
    Store k(in.k_code, in.k_token, in.k_rotated, true, in.heads, in.k_dim, int(blocks));
    Store v(in.v_code, in.v_token, in.v_rotated, false, in.heads, in.v_dim, int(blocks));
    const int64_t tokens = int64_t(slots.size());
    const auto keys = normals(tokens * in.heads * in.k_dim), values = normals(tokens * in.heads * in.v_dim);

    // Raw pages: page 0 of each sequence, then its ring; in hand what a chunk sees from its oldest own span on.
    const int ring_pages = std::max(in.span, BLOCK) / BLOCK;
    std::vector<int64_t> first, ring, hand, raw_slots, hand_slots;
    int64_t hand_pages = 0;
    for (int s = 0; s < sequences; s++) {
        const int64_t end = in.kv_len[s], span = std::max(in.span, BLOCK), begin = (end - in.fresh[s]) / span * span;
        first.push_back(s);
        ring.push_back(sequences + s * ring_pages);
        hand.push_back(in.fresh[s] > 1 ? hand_pages : -1);
        for (int64_t t = 0; t < end; t++) {
            raw_slots.push_back(t < BLOCK ? first[s] * BLOCK + t
                                          : t >= (end - 1) / span * span ? ring[s] * BLOCK + t % span : -1);
            hand_slots.push_back(in.fresh[s] > 1 && t >= begin ? hand_pages * BLOCK + t - begin : -1);
        }
        raw_slots.push_back(-1), hand_slots.push_back(-1);
        if (in.fresh[s] > 1) hand_pages += (end - begin + BLOCK - 1) / BLOCK;
    }
    const int raw_pages = sequences * (1 + ring_pages);
    Store raw_k(Code::FP32, false, false, true, in.heads, in.k_dim, raw_pages);
    Store raw_v(Code::FP32, false, false, false, in.heads, in.v_dim, raw_pages);
    Store hand_k(Code::FP32, false, false, true, in.heads, in.k_dim, int(hand_pages));
    Store hand_v(Code::FP32, false, false, false, in.heads, in.v_dim, int(hand_pages));
    // Rows of earlier steps are written one store at a time, new ones by attend itself; a padded row goes nowhere.
    std::vector<int64_t> fresh;
    for (int64_t s = 0, row = 0; s < sequences; row += in.kv_len[s] + 1, s++)
        for (int64_t i = 0; i < in.fresh[s]; i++) fresh.push_back(row + (in.kv_len[s] ? in.kv_len[s] - in.fresh[s] + i : 0));
    auto taken = [&](std::vector<int64_t>& places) {  // those of new rows; the others keep theirs
        std::vector<int64_t> own;
        for (int64_t row : fresh) own.push_back(std::exchange(places[row], -1));
        return own;
    };
    auto rows_of = [&](const std::vector<float>& x, int64_t width) {
        std::vector<float> own;
        for (int64_t row : fresh) own.insert(own.end(), x.begin() + row * width, x.begin() + (row + 1) * width);
        return own;
    };
    const auto new_slots = taken(slots), new_raw_slots = taken(raw_slots), new_hand_slots = taken(hand_slots);
    const int64_t k_width = int64_t(in.heads) * in.k_dim, v_width = int64_t(in.heads) * in.v_dim;
    const auto new_keys = rows_of(keys, k_width), new_values = rows_of(values, v_width);
    auto write = [&](const Side& side, const std::vector<int64_t>& places) {
        const Rows x = {side.is_k ? keys.data() : values.data(), Float::FP32, side.is_k ? k_width : v_width, side.dim};
        kernels.write(side, x, places.data(), tokens, POOL);
    };
    for (const Side& side : {k.side, v.side}) write(side, slots);
    for (const Side& side : {raw_k.side, raw_v.side}) write(side, raw_slots);
    for (const Side& side : {hand_k.side, hand_v.side}) write(side, hand_slots);
    const Edges edges = {in.span, raw_k.side, raw_v.side, first.data(), ring.data(), new_raw_slots.data(),
                         hand_k.side, hand_v.side, hand.data(), new_hand_slots.data()};
    const NewRows new_rows = {{new_keys.data(), Float::FP32, k_width, in.k_dim},
                              {new_values.data(), Float::FP32, v_width, in.v_dim}, new_slots.data()};

    const int query_heads = in.heads * in.group;
    const size_t rows = q_start.back();
    const auto q = normals(rows * query_heads * in.k_dim), sinks = normals(query_heads);
    std::vector<uint16_t> half(q.size());
    for (uint16_t& bits : half) bits = random_bits(in.type);
    Attention attention = in.attention;
    attention.heads = query_heads;
    if (attention.sinks) attention.sinks = sinks.data();
    const Step step = {sequences, q_start.data(), in.kv_len.data(), table.data(), width};
    const bool full = in.type == Float::FP32;
    const Rows queries = {full ? (const void*)q.data() : half.data(), in.type, query_heads * in.k_dim, in.k_dim};
    auto answers = [&](auto kernel) {
        std::vector<float> out(rows * query_heads * in.v_dim);
        std::vector<uint16_t> bits(full ? 0 : out.size());
        kernel(full ? (void*)out.data() : bits.data());
        for (size_t i = 0; i < bits.size(); i++) out[i] = from_bits(in.type, bits[i]);
        return out;
    };
    Answer answer;
    auto attended = [&](bool bytes) {
        return answers([&](void* out) {
            kernels.attend(k.side, v.side, in.span ? &edges : nullptr, attention, step, new_rows, queries, out, bytes, POOL);
        });
    };
    answer.exact = attended(false);
    answer.saturated = k.saturated + v.saturated;
    answer.by_bytes = attended(true);  // writes the same again
    answer.k_codes = k.codes;
    answer.v_codes = v.codes;
    return answer;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
    double error = 0, size = 1e-9;
    for (size_t i = 0; i < a.size(); i++) {
        error += std::pow(double(a[i]) - b[i], 2);
        size += double(b[i]) * b[i];
    }
    return std::sqrt(error / size);
}

}  // namespace

int main() {
    const Code codes[] = {Code::BF16, Code::FP16, Code::FP32, Code::INT8, Code::INT8, Code::INT4};
    const bool token[] = {false, false, false, false, true, true};
    for (int i = 0; i < 300; i++) {
        random_source.seed(1000 + i);
        const int k = i % 6, v = pick(0, 5);
        Input in{};
        in.k_code = codes[k], in.k_token = token[k], in.k_rotated = k == 5 || (k == 4 && pick(0, 1));
        in.v_code = codes[v], in.v_token = token[v], in.v_rotated = v == 5 && pick(0, 1);
        in.heads = pick(1, 3), in.group = pick(1, 5), in.k_dim = 8 * pick(1, 20), in.v_dim = 8 * pick(1, 20);
        // Contexts of more than 8 blocks are split; one without tokens is a padded row.
        for (int n = pick(1, 3); n > 0; n--) {
            in.kv_len.push_back(pick(0, 7) ? pick(1, 3 * BLOCK) : pick(0, 1) * 12 * BLOCK);
            in.fresh.push_back(pick(0, 1) ? 1 : pick(1, std::max<int>(1, int(in.kv_len.back()))));
        }
        in.type = Float(pick(0, 2));
        in.span = pick(0, 1) ? 0 : BLOCK << pick(0, 1);
        in.attention.scale = 0.2f;
        static const float yes = 0;  // run() puts the real sinks in its place
        if (pick(0, 2) == 0) in.attention.window = pick(1, 150);
        if (pick(0, 3) == 0) in.attention.softcap = 3;
        if (pick(0, 3) == 0) in.attention.sinks = &yes;
        const Answer own = run(TESTED::kernels, in, i), expected = run(portable::kernels, in, i);
        const double exact = difference(own.exact, expected.exact), bytes = difference(own.by_bytes, expected.by_bytes);
        // Rounding differs by the order of sums; a weight, or a 16-bit answer, may therefore round the other way.
        const double allowed = in.type == Float::BF16 ? 2e-3 : in.type == Float::FP16 ? 5e-4 : 2e-4;
        if (own.k_codes != expected.k_codes || own.v_codes != expected.v_codes || own.saturated != expected.saturated ||
            !(exact < allowed) || !(bytes < allowed)) {
            std::printf("case %d: codes %d of K, %d of V, in float32 %g, by bytes %g\n", i, k, v, exact, bytes);
            return 1;
        }
    }
    std::printf("%s agrees with portable in 300 cases\n", TESTED::kernels.name);
    return 0;
}
