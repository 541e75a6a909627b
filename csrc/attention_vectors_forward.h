// What attention's forward multiplies, as vectors of floats.
#pragma once

#include "attention_vectors.h"

namespace trilby::TRILBY_LEVEL {

struct ForwardProducts {
  static constexpr int64_t STEP = 8;      // what a panel sees of a block begins at multiples of so many keys
  static constexpr int64_t PART = BLOCK;  // keys whose scores are made at once
  static constexpr int SLACK = 0;         // outputs shrink in the product, for nothing
  BlockLoader blocks;

  static int64_t output_rows(int64_t value_dim) { return value_dim; }

  void place(Carver& carver, const AttentionShape& shape) {
    blocks.place(carver, shape);
    queries_ = carver.take(PANELS * shape.head_dim * PANEL);
    seen_ = carver.take(BLOCK * PANEL);
  }

  template <class Format>
  void pack_queries(int64_t p, const typename Format::Element* from, const View& view, int64_t count, int64_t head_dim,
                    float sign) const {
    pack_transposed<Format>(from, view, count, head_dim, sign, queries_ + p * head_dim * PANEL, PANEL);
  }

  // Sᵀ[n][m] of panel p.
  void scores(int64_t p, const KeyBlock& block, const AttentionShape& shape, const Sight& sight, float* out) const {
    keys_by_panel(sight, block.keys, shape.head_dim, queries_ + p * shape.head_dim * PANEL, out);
  }

  KeepInPlace keep(int64_t, float* scores) const { return {scores}; }
  void take_probabilities(int64_t, const float*, int64_t) const {}

  static bool shrink_first(const float*) { return false; }
  static void shrink(const float*, int64_t, float*) {}

  // Oᵀ[d][m] = Oᵀ[d][m] · factors[m] + sum over n of V[n][d] · Pᵀ[n][m].
  void add_values(int64_t, const KeyBlock& block, const AttentionShape& shape, const Sight& sight,
                  const float* probabilities, const float* factors, bool, float* outputs) const {
    const bool hidden = zero_hides(sight, block.values, block.count, shape.value_dim);
    panel_by_keys<Start::rescale>(sight, block.values, shape.value_dim, probabilities, outputs, factors,
                                  hidden ? nullptr : seen_pairs(sight, block.count, seen_));
  }

 private:
  float *queries_, *seen_;  // of PANELS panels [D][PANEL]; [BLOCK][PANEL]
};

}  // namespace trilby::TRILBY_LEVEL
