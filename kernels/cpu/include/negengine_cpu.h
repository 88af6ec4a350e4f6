/* Negative token merging (arXiv 2412.01339) on CPUs, and guidance at the end: a plain C interface, independent of any tensor library.
 *
 *   S[i, j] = <x_i, r_j> / (max(|x_i|, eps) max(|r_j|, eps)),  eps = 1e-12
 *   j(i)    = the allowed j with the largest S[i, j], the lowest of equals
 *   y_i     = (1 + alpha) x_i - alpha r_j(i)  where S[i, j(i)] > threshold, else x_i
 *
 * The same input gives the same bits with any number of threads. Functions return NEGENGINE_OK or an error code and
 * write nothing in the latter case, unless it is NEGENGINE_ERROR_MEMORY.
 */
#ifndef NEGENGINE_CPU_H
#define NEGENGINE_CPU_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(NEGENGINE_BUILD)
#define NEGENGINE_API __declspec(dllexport)
#elif defined(_WIN32)
#define NEGENGINE_API __declspec(dllimport)
#else
#define NEGENGINE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define NEGENGINE_ABI 3 /* of this header; a caller compares it with negengine_abi() */

enum negengine_status {
  NEGENGINE_OK = 0,
  NEGENGINE_ERROR_ARGUMENT = 1,    /* a null pointer, a negative size, an unknown constant */
  NEGENGINE_ERROR_SHAPE = 2,       /* sizes that do not fit each other or exceed the limits below */
  NEGENGINE_ERROR_REFERENCE = 3,   /* an entry of `references` is not an image of the bank */
  NEGENGINE_ERROR_INDEX = 4,       /* an entry of `index` is not a token of the references */
  NEGENGINE_ERROR_UNSUPPORTED = 5, /* the instruction set in use lacks this search */
  NEGENGINE_ERROR_MEMORY = 6       /* no memory for the workspace */
};

enum negengine_dtype { NEGENGINE_F32 = 0, NEGENGINE_BF16 = 1, NEGENGINE_F16 = 2 };

enum negengine_matching {
  NEGENGINE_PAPER = 0,  /* the best reference token for each source token */
  NEGENGINE_RELEASE = 1 /* the best source token for each reference token, as in the published code; K == 1, M == T */
};

enum negengine_search {
  NEGENGINE_AUTO = 0,  /* the fastest that keeps the numeric contract of the dtype */
  NEGENGINE_EXACT = 1, /* never quantises */
  NEGENGINE_SEARCH_BF16 = 2,
  NEGENGINE_SEARCH_INT8 = 3 /* both re-score their candidates exactly */
};

/* Instruction sets, each including those before it. */
enum negengine_isa {
  NEGENGINE_ISA_PORTABLE = 0,
  NEGENGINE_ISA_AVX2 = 1, /* with FMA and F16C */
  NEGENGINE_ISA_AVX512 = 2, /* F, BW, DQ, VL */
  NEGENGINE_ISA_AVX512_VNNI = 3,
  NEGENGINE_ISA_AVX512_BF16 = 4
};

/* Source tokens x [B, T, D], reference tokens bank [R, M, D], and which images are whose reference.
 *
 * All strides count elements and may be zero (an expanded tensor) or larger than what they step over; channels are adjacent.
 * B, T >= 0; R, M, D, K >= 1; K * M < 2^31; D <= 2^24, and D <= 131072 for an int8 search that is asked for.
 */
typedef struct negengine_problem {
  const void *x;
  const void *bank;          /* may be x, or overlap it */
  const int32_t *references; /* [B, K]: images of the bank; a negative entry is padding */
  const uint8_t *mask;       /* [R, M]: nonzero where a reference token may be matched; or NULL */
  int64_t B, T, D, R, M, K;
  int64_t x_image, x_token; /* strides of x */
  int64_t bank_image, bank_token;
  int64_t references_image, references_slot;
  int64_t mask_image, mask_token;
  int32_t dtype, matching, search;
  int32_t threads; /* at most this many; >= 1 */
} negengine_problem;

/* Memory and threads that calls share. Calls on one workspace exclude each other; use several to run several at once. */
typedef struct negengine_workspace negengine_workspace;

NEGENGINE_API int negengine_abi(void);
NEGENGINE_API const char *negengine_status_text(int status);

/* limit: bytes to keep between calls (a call may use more and gives the rest back). NULL if there is no memory. */
NEGENGINE_API negengine_workspace *negengine_workspace_create(size_t limit);
NEGENGINE_API void negengine_workspace_destroy(negengine_workspace *workspace);
NEGENGINE_API size_t negengine_workspace_bytes(const negengine_workspace *workspace); /* kept now */
NEGENGINE_API size_t negengine_workspace_peak(const negengine_workspace *workspace);  /* most that any call used */
NEGENGINE_API void negengine_workspace_release(negengine_workspace *workspace);       /* gives all memory back */

/* Runs body(data) on `threads` threads or fewer, the caller's among them, and returns when all have. `flags` is 0. GOMP_parallel
 * of an OpenMP runtime is such a function. */
typedef void (*negengine_parallel)(void (*body)(void *data), void *data, unsigned threads, unsigned flags);

/* Whose threads work for this workspace: those of `parallel`, or its own (NULL, as at first). Take those of the runtime that the
 * caller's other work runs on: when that work ends its threads spin for milliseconds, waiting for more, in the way of any others.
 * A child after fork() uses the workspace's own. */
NEGENGINE_API void negengine_workspace_use(negengine_workspace *workspace, negengine_parallel parallel);

/* The instruction set in use: the best of this processor, or a lower one named by the environment variable
 * NEGENGINE_CPU_ISA (portable, avx2, avx512, avx512_vnni, avx512_bf16) or set here. */
NEGENGINE_API int negengine_isa(void);
NEGENGINE_API const char *negengine_isa_name(int isa); /* NULL if there is none such */
NEGENGINE_API int negengine_set_isa(int isa);          /* NEGENGINE_ERROR_UNSUPPORTED if the processor or the build lacks it */
NEGENGINE_API int negengine_supports(int search);      /* 1 if the instruction set in use has this search */
/* "fp32", "bf16" or "int8": what this search multiplies; NULL if the instruction set in use does not have it. */
NEGENGINE_API const char *negengine_precision(int dtype, int search);

/* cosine [B, T], index [B, T]: slot * M + token, or -1 (and cosine -inf) where nothing can be matched. */
NEGENGINE_API int negengine_match(negengine_workspace *workspace, const negengine_problem *problem, float *cosine, int32_t *index);

/* y [B, T, D] from indices as negengine_match gives them. alpha [B], gate [B, T]: adjacent. y may be x, with its strides; otherwise
 * it must not overlap x. All reads are of values from before the update, also when y overlaps the bank. */
NEGENGINE_API int negengine_merge(negengine_workspace *workspace, const negengine_problem *problem, const int32_t *index,
                                  const uint8_t *gate, const double *alpha, void *y, int64_t y_image, int64_t y_token);

/* The whole call. alpha [B] with a stride; threshold: one number; keep [B, T] (nonzero: may be merged) with strides, or NULL;
 * stats [3] with a stride, or NULL: merged tokens, tokens that had a reference, and one call are added. */
typedef struct negengine_merge_arguments {
  void *y;
  const double *alpha;
  const double *threshold;
  const uint8_t *keep;
  int64_t *stats;
  int64_t y_image, y_token, alpha_image, keep_image, keep_token, stats_entry;
} negengine_merge_arguments;

NEGENGINE_API int negengine_negtome(negengine_workspace *workspace, const negengine_problem *problem,
                                    const negengine_merge_arguments *merge);

/* Guidance away from a prediction (dynamic negative guidance, arXiv 2410.14398). n images of `size` adjacent elements each:
 *
 *   e = conditional, m = negative                               without unconditional (NULL)
 *   e = u + guidance (conditional - u), m = negative            with it
 *   e the same, m = u + guidance (negative - u)                 with it and guide_negative
 *
 * Strides count elements and may be zero. n, size >= 0. Arithmetic is in float32. */
typedef struct negengine_branches {
  const void *conditional, *negative, *unconditional;
  int64_t n, size;
  int64_t conditional_image, negative_image, unconditional_image; /* strides */
  double guidance;
  int32_t dtype, guide_negative;
  int32_t threads; /* at most this many; >= 1 */
} negengine_branches;

/* out [copies * n, size], adjacent: e + strength (e - m), strength [n], written copies >= 1 times, one after another. out must not
 * overlap what is read. */
NEGENGINE_API int negengine_guide(negengine_workspace *workspace, const negengine_branches *branches, const double *strength,
                                  int64_t copies, void *out);

/* sample, previous [n, size]; x0_a = means[0] sample + means[1] a, clamped to [-clip, clip] (clip > 0, may be infinite), and
 * d_a = previous - (means[2] x0_a + means[3] sample) for a in {e, m}. */
typedef struct negengine_transition {
  const void *sample, *previous;
  int64_t sample_image, previous_image; /* strides */
  double means[4];
  double clip;
  int32_t sample_dtype, previous_dtype;
} negengine_transition;

/* sums [3, n]: of (d_m - d_e)(d_m + d_e), of d_m^2, of d_e^2, over the elements of each image. */
NEGENGINE_API int negengine_evidence(negengine_workspace *workspace, const negengine_branches *branches,
                                     const negengine_transition *transition, double *sums);

/* Normalized attention guidance (arXiv 2505.21179), token by token: with g = positive + (scale - 1)(positive - negative),
 * out = alpha g min(1, tau |positive|_1 / |g|_1) + (1 - alpha) positive, the factor being 1 where g is zero.
 *
 * [B, T, D], channels adjacent, strides count elements. out may be positive and other negative, each with the strides of its name;
 * otherwise neither may overlap what is read. other: written like out, or NULL. B, T, D >= 0, tau >= 0, numbers finite. */
typedef struct negengine_nag_arguments {
  const void *positive, *negative;
  void *out, *other;
  int64_t B, T, D;
  int64_t positive_image, positive_token, negative_image, negative_token, out_image, out_token, other_image, other_token;
  double scale, tau, alpha;
  int32_t dtype;
  int32_t threads; /* at most this many; >= 1 */
} negengine_nag_arguments;

NEGENGINE_API int negengine_nag(negengine_workspace *workspace, const negengine_nag_arguments *arguments);

#ifdef __cplusplus
}
#endif
#endif
