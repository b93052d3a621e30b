// Makes the calls of a file on the kernels of states and writes what they leave in memory; run by test_state_arm.py, natively
// or emulated, with the file's names. A file holds calls, each a line with the function's name and the number of its arguments,
// then an argument a line: `n VALUE`, `t BYTES` with that many bytes after the line, or `0` for none. Written are the bytes of
// all tensors in the same order.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#define CALLS(X)                                                                                                           \
    X(llmc_state_update)                                                                                                   \
    X(llmc_dsq_update)                                                                                                     \
    X(llmc_dsq_replay_update)                                                                                              \
    X(llmc_dsq_pack)                                                                                                       \
    X(llmc_dsq_scan)                                                                                                       \
    X(llmc_dsq_scan_backward)                                                                                              \
    X(llmc_mamba2_decode)                                                                                                  \
    X(llmc_mamba2_prefill)

// numbers and addresses are passed alike: in order, eight bytes each
#define ARGUMENTS(V) V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V, V
#define DECLARE(name) extern "C" int name(ARGUMENTS(int64_t));
CALLS(DECLARE)

using Function = int (*)(ARGUMENTS(int64_t));
constexpr int MOST = 32;

static Function called(const std::string& name) {
#define FIND(other) \
    if (name == #other) return other;
    CALLS(FIND)
    return nullptr;
}

int main(int, char** names) {
    std::FILE *in = std::fopen(names[1], "rb"), *out = std::fopen(names[2], "wb");
    if (!in || !out) return 2;
    char name[64], kind;
    int count, calls = 0;
    while (std::fscanf(in, "%63s %d\n", name, &count) == 2) {
        const Function function = called(name);
        if (!function || count > MOST) return std::printf("%s with %d arguments\n", name, count), 3;
        int64_t a[MOST] = {};
        // eights, so that they are aligned as tensors are
        std::vector<std::vector<uint64_t>> tensors(MOST);
        std::vector<size_t> sizes(MOST);
        for (int i = 0; i < count; ++i) {
            long long value = 0;
            if (std::fscanf(in, "%c %lld", &kind, &value) != 2 || std::fgetc(in) != '\n') return 4;
            a[i] = value;
            if (kind != 't') continue;
            sizes[i] = size_t(value);
            tensors[i].resize(sizes[i] / 8 + 9);
            a[i] = (reinterpret_cast<int64_t>(tensors[i].data()) + 63) / 64 * 64;
            if (std::fread(reinterpret_cast<void*>(a[i]), 1, sizes[i], in) != sizes[i]) return 5;
        }
        const int code = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
                                  a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29],
                                  a[30], a[31]);
        if (code != 0) return std::printf("%s gives %d\n", name, code), 6;
        for (int i = 0; i < count; ++i) std::fwrite(reinterpret_cast<void*>(a[i]), 1, sizes[i], out);
        ++calls;
    }
    std::printf("%d calls\n", calls);
    return std::fclose(out) == 0 ? 0 : 7;
}
