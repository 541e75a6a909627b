// What becomes of a block of scores between q · k and the softmax, beside a scale: softcap, ALiBi, an additive mask.
#pragma once

#include "attention_sight.h"

namespace trilby::TRILBY_LEVEL {

// Whether scores are more than a product and a scale. Then they are scaled before, and not within, the softmax.
static inline bool adjusts(const AttentionRule& rule) {
  return rule.softcap > 0.0f || rule.alibi_slopes || (rule.mask_kind != Mask::none && rule.mask_kind != Mask::boolean);
}

// s = softcap · tanh(s / softcap), for `count` scores; leaves in `slopes`, if wanted, the derivative 1 - tanh².
static inline void cap(float* scores, int64_t count, float softcap, float* slopes) {
  const float inverse = 1.0f / softcap;
  for (int64_t i = 0; i < count; i += LANES) {
    const Vector bent = tanh(load(scores + i) * inverse);
    store(scores + i, bent * softcap);
    if (slopes) store(slopes + i, 1.0f - bent * bent);
  }
}

// Scores [block.count][PANEL] as products of query and key to scores as the softmax takes them, before any are hidden.
static inline void adjust(const AttentionRule& rule, float scale, const Sequence& sequence, int64_t head,
                          const Sight& sight, int64_t count, float* scores, float* slopes) {
  for (int64_t i = 0; i < count * PANEL; i += LANES) store(scores + i, load(scores + i) * scale);
  if (rule.softcap > 0.0f) cap(scores, count * PANEL, rule.softcap, slopes);
  if (rule.alibi_slopes) {
    const float slope = rule.alibi_slopes[sequence.number * rule.alibi_sequence + head * rule.alibi_head];
    for (int64_t i = 0; i < count * PANEL; i += LANES) {
      const int64_t key = i / PANEL, query = i % PANEL;
      const Vector distance = lane_numbers() + static_cast<float>(query + sight.shift + sequence.offset - key);
      store(scores + i, load(scores + i) - (Vector)((Bits)distance & 0x7fffffffu) * slope);
    }
  }
  if (sight.mask.added && rule.mask_kind != Mask::boolean) {
    for (int64_t i = 0; i < count * PANEL; i += LANES) store(scores + i, load(scores + i) + load(sight.mask.added + i));
  }
}

}  // namespace trilby::TRILBY_LEVEL
