// Before every other header of a file that is compiled for a processor without AVX-512 (toolchain.py): from here on its
// intrinsics are SIMDe's functions, and those of definitions.h.
#pragma once

#include <immintrin.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>

#include "definitions.h"
#pragma GCC diagnostic pop

#undef _mm256_cmp_ps_mask
#define _mm256_cmp_ps_mask(...) emulated::mm256_cmp_ps_mask(__VA_ARGS__)
#undef _mm256_cmplt_epu32_mask
#define _mm256_cmplt_epu32_mask(...) emulated::mm256_cmplt_epu32_mask(__VA_ARGS__)
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(...) emulated::mm256_mask_storeu_epi16(__VA_ARGS__)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(...) emulated::mm512_cmp_ps_mask(__VA_ARGS__)
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32(...) emulated::mm512_cvtepi16_epi32(__VA_ARGS__)
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(...) emulated::mm512_cvtepi32_epi16(__VA_ARGS__)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(...) emulated::mm512_cvtepi32_epi8(__VA_ARGS__)
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(...) emulated::mm512_cvtepi32_ps(__VA_ARGS__)
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(...) emulated::mm512_cvtepu16_epi32(__VA_ARGS__)
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(...) emulated::mm512_cvtepu8_epi32(__VA_ARGS__)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(...) emulated::mm512_cvtph_ps(__VA_ARGS__)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(...) emulated::mm512_cvtps_epi32(__VA_ARGS__)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(...) emulated::mm512_cvtps_ph(__VA_ARGS__)
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32(...) emulated::mm512_dpbusd_epi32(__VA_ARGS__)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(...) emulated::mm512_extractf32x8_ps(__VA_ARGS__)
#undef _mm512_load_ps
#define _mm512_load_ps(...) emulated::mm512_load_ps(__VA_ARGS__)
#undef _mm512_load_si512
#define _mm512_load_si512(...) emulated::mm512_load_si512(__VA_ARGS__)
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask(...) emulated::mm512_mask_cmp_ps_mask(__VA_ARGS__)
#undef _mm512_mask_store_ps
#define _mm512_mask_store_ps(...) emulated::mm512_mask_store_ps(__VA_ARGS__)
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(...) emulated::mm512_mask_storeu_ps(__VA_ARGS__)
#undef _mm512_mask_test_epi16_mask
#define _mm512_mask_test_epi16_mask(...) emulated::mm512_mask_test_epi16_mask(__VA_ARGS__)
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(...) emulated::mm512_maskz_loadu_ps(__VA_ARGS__)
#undef _mm512_permute_ps
#define _mm512_permute_ps(...) emulated::mm512_permute_ps(__VA_ARGS__)
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8(...) emulated::mm512_permutex2var_epi8(__VA_ARGS__)
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8(...) emulated::mm512_permutexvar_epi8(__VA_ARGS__)
#undef _mm512_range_ps
#define _mm512_range_ps(...) emulated::mm512_range_ps(__VA_ARGS__)
#undef _mm512_rcp14_ps
#define _mm512_rcp14_ps(...) emulated::mm512_rcp14_ps(__VA_ARGS__)
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32(...) emulated::mm512_reduce_add_epi32(__VA_ARGS__)
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps(...) emulated::mm512_reduce_add_ps(__VA_ARGS__)
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32(...) emulated::mm512_reduce_max_epu32(__VA_ARGS__)
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps(...) emulated::mm512_reduce_max_ps(__VA_ARGS__)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(...) emulated::mm512_roundscale_ps(__VA_ARGS__)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps(...) emulated::mm512_scalef_ps(__VA_ARGS__)
#undef _mm512_shldi_epi16
#define _mm512_shldi_epi16(...) emulated::mm512_shldi_epi16(__VA_ARGS__)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(...) emulated::mm512_shuffle_f32x4(__VA_ARGS__)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(...) emulated::mm512_shuffle_i32x4(__VA_ARGS__)
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2(...) emulated::mm512_shuffle_i64x2(__VA_ARGS__)
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps(...) emulated::mm512_shuffle_ps(__VA_ARGS__)
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(...) emulated::mm512_srai_epi32(__VA_ARGS__)
#undef _mm512_store_ps
#define _mm512_store_ps(...) emulated::mm512_store_ps(__VA_ARGS__)
#undef _mm512_store_si512
#define _mm512_store_si512(...) emulated::mm512_store_si512(__VA_ARGS__)
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32(...) emulated::mm512_ternarylogic_epi32(__VA_ARGS__)
#undef _mm512_testn_epi16_mask
#define _mm512_testn_epi16_mask(...) emulated::mm512_testn_epi16_mask(__VA_ARGS__)
