// Low-bit products in NEON against the portable ones, on random weights; run by test_neon.py, natively or emulated.
// The last line has the number of cases, how many are off, and the largest relative distance.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "llmcompress/isa.h"
#include "llmcompress/lowbit.h"
#include "llmcompress/types.h"

using namespace llmcompress;

// the products of cpu/products, under names that go together
extern "C" {
extern const Variant neon_products, portable_products;
}

namespace {

std::mt19937 draw(1);
int cases = 0, off = 0;
double worst = 0;

struct Made {
    std::vector<uint32_t> packed, zero;
    std::vector<uint16_t> scale;
    Weight weight{};

    Made(int bits, int64_t columns, int64_t group, bool zeros) {
        weight.rows = 48, weight.columns = columns, weight.group = group, weight.bits = bits;
        packed.resize(size_t(weight.rows * weight.words()));
        zero.resize(size_t(weight.rows * weight.zero_words()));
        scale.resize(size_t(weight.rows * weight.groups()));
        for (auto* words : {&packed, &zero}) std::generate(words->begin(), words->end(), std::ref(draw));
        for (auto& s : scale) s = float_to_half(0.01f + 0.0001f * float(draw() % 100));
        weight.packed = packed.data(), weight.scale = scale.data(), weight.zero = zeros ? zero.data() : nullptr;
    }
};

std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> of(0, 2);
    std::vector<float> x;
    for (int64_t i = 0; i < count; ++i) x.push_back(of(draw));
    return x;
}

void judge(const std::vector<float>& found, const std::vector<float>& wanted, double allowed) {
    double apart = 0, size = 0;
    for (size_t i = 0; i < wanted.size(); ++i) apart += std::pow(found[i] - wanted[i], 2), size += wanted[i] * wanted[i];
    const double relative = std::sqrt(apart / size);
    ++cases, off += !(relative <= allowed), worst = std::max(worst, relative);
}

std::vector<float> product(const Variant& v, const Weight& w, int planes, int64_t tokens, const std::vector<float>& x) {
    std::vector<Chunk> parts(size_t(chunk_count(w.group, w.columns, planes)));
    chunks(w.bits, w.group, w.columns, parts.data(), planes);
    std::vector<char> memory(activation_bytes(w, tokens, planes));
    const Activations a = place_activations(w, tokens, planes, memory.data(), v.token_block);
    const int64_t count = int64_t(parts.size());
    for (int64_t b = 0; b < a.blocks(); ++b) v.quantize(w, parts.data(), count, x.data(), FP32, w.columns, nullptr, a, b);
    std::vector<float> out(size_t(tokens * w.rows), NAN);
    v.rows(w, parts.data(), count, a, 0, w.blocks(), out.data(), FP32, w.rows);
    return out;
}

void products(const Variant& neon, const Variant& portable, int bits) {
    for (int64_t columns : {64, 160, 512})
        for (int64_t group : {32, 64, 128, 512})
            for (int zeros = 0; zeros < 2; ++zeros) {
                if (declined(bits, std::min(group, columns), columns)) continue;
                const Made made(bits, columns, std::min(group, columns), zeros == 1);
                for (int64_t tokens : {1, 2, 4, 5, 9, 33})
                    for (int planes : {1, 2, 3}) {
                        const std::vector<float> x = normal(tokens * columns);
                        judge(product(neon, made.weight, planes, tokens, x), product(portable, made.weight, planes, tokens, x), 1e-6);
                    }
            }
}

void rest(const Variant& neon, const Variant& portable) {
    for (int64_t columns : {5, 16, 77})
        for (int64_t tokens : {1, 3, 4, 7}) {
            const std::vector<float> weight = normal(8 * columns), x = normal(tokens * columns);
            std::vector<float> row(size_t(columns), 0.f), out[2];
            for (int i = 0; i < 2; ++i) {
                out[i].assign(size_t(tokens * 8), NAN);
                (i == 0 ? neon : portable).dense_rows(weight.data(), FP32, columns, x.data(), tokens, 0, 8, row.data(), out[i].data(), 8);
            }
            judge(out[0], out[1], 1e-5);
        }
    for (Activation a : {SILU, GELU, GELU_TANH, GPT_OSS, RELU2}) {
        const std::vector<float> hidden = normal(2 * 37);
        std::vector<float> out[2];
        for (int i = 0; i < 2; ++i) {
            out[i].assign(37, NAN);
            (i == 0 ? neon : portable).gate(hidden.data(), 37, a, 1.7f, 7.f, out[i].data());
        }
        judge(out[0], out[1], 1e-6);
    }
}

}  // namespace

int main() {
    if (!has_neon()) return std::puts("this processor has no dot products of bytes"), 2;
    const Variant &neon = neon_products, &portable = portable_products;
    for (int bits : {2, 3, 4, 8}) products(neon, portable, bits);
    rest(neon, portable);
    std::printf("%d cases, %d off, at most %g\n", cases, off, worst);
    return off != 0;
}
