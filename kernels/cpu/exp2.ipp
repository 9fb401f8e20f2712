// 2**f on [-0.5, 0.5]: the Taylor series of exp(f ln 2) to degree 6, relative error about 1.3e-7.
inline V exp2_polynomial(V f) {
  V p = vset1(1.54035304e-4f);
  p = vfma(p, f, vset1(1.33335581e-3f));
  p = vfma(p, f, vset1(9.61812911e-3f));
  p = vfma(p, f, vset1(5.55041087e-2f));
  p = vfma(p, f, vset1(2.40226507e-1f));
  p = vfma(p, f, vset1(6.93147181e-1f));
  return vfma(p, f, vset1(1.0f));
}
