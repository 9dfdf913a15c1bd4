// Transformations of a head's outputs before the softmax. One type per form.
#pragma once
#include <cmath>

#include "vector.h"

namespace deltaw {

const float NO_LOGIT = -INFINITY;  // excluded class: its e^z is 0

// z = scale · logit.
struct Scaled {
    float scale;
    F16 by = set_f(scale);

    explicit Scaled(float scale) : scale(scale) {}

    DW_INLINE F16 value(F16 logit) const { return logit * by; }
    float value(float logit) const { return logit * scale; }
    // ∂z/∂logit at the value z.
    DW_INLINE F16 slope(F16) const { return by; }
    float slope(float) const { return scale; }
};

// z = cap · tanh(scale · logit / cap).
struct Capped {
    float scale, cap;
    F16 by = set_f(scale), limit = set_f(cap), inverse = set_f(1 / cap);

    Capped(float scale, float cap) : scale(scale), cap(cap) {}

    DW_INLINE F16 value(F16 logit) const {
        return select(logit < set_f(-3.3e38f), set_f(NO_LOGIT), limit * tanh_16(logit * by * inverse));
    }
    float value(float logit) const { return cap * std::tanh(scale * logit / cap); }
    DW_INLINE F16 slope(F16 z) const {
        const F16 t = max(z, set_f(-cap)) * inverse;
        return by * fnma(t, t, set_f(1.0f));
    }
    float slope(float z) const { return scale * (1 - z / cap * (z / cap)); }
};

// Call body(Scaled or Capped). A cap of 0 means no cap.
template <class Body>
inline void with_transform(float scale, float cap, Body &&body) {
    if (cap > 0) body(Capped(scale, cap));
    else body(Scaled(scale));
}

// Load 16 logits of a row of V, starting at v. Logits beyond the end become NO_LOGIT.
template <class T>
DW_INLINE F16 logits_at(const T *row, int64_t v, int64_t V) {
    if (v + 16 <= V) return load16(row + v);
    return select_first(first(V - v), load16(row + v, first(V - v)), set_f(NO_LOGIT));
}

}  // namespace deltaw
