// Functions of a Vector, whichever its width. Included inside a target region, after vector_*.h.
#pragma once

namespace starling {
namespace {

// e^x within 2 units in the last place, from -87.3 on: 2^n * p(f) with x = (n + f) ln 2 and |f| <= 1/2, where p is the
// minimax polynomial of Cephes' expf. Below it is e^-87.3, which is 0 beside anything that it is added to here.
inline Vector exp(Vector x) {
  x = min(Vector::all(88.3f), max(Vector::all(-87.3f), x));  // in this order what is not a number stays none
  const Vector n = rounded(x * Vector::all(1.44269504088896341f));
  const Vector r = fnma(n, Vector::all(-2.12194440e-4f), fnma(n, Vector::all(0.693359375f), x));
  Vector p = Vector::all(1.9875691500e-4f);
  p = fma(p, r, Vector::all(1.3981999507e-3f));
  p = fma(p, r, Vector::all(8.3334519073e-3f));
  p = fma(p, r, Vector::all(4.1665795894e-2f));
  p = fma(p, r, Vector::all(1.6666665459e-1f));
  p = fma(p, r, Vector::all(5.0000001201e-1f));
  return scaled(fma(p * r, r, r + Vector::all(1.0f)), n);
}

// x / (1 + e^-x)
inline Vector silu(Vector x) { return x / (Vector::all(1.0f) + exp(Vector::zero() - x)); }

}  // namespace
}  // namespace starling
