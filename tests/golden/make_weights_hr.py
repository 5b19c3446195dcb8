#!/usr/bin/env python3
"""Deterministic random weights for the high-resolution golden sets (patch 64 / 128 / 160). Own code, numpy only.

Same recipe as make_weights.py (kept beside this file, unchanged): every tensor is a pure function of (set name, key, shape),
  seed = first 4 bytes, little endian, of sha256(f"{set}|{key}");  u = RandomState(seed).random_sample(shape)
  value = float32(centre + (2u - 1) * halfwidth)
with two differences, both only for local_decoder.* :
  * `up*` convolutions use gain 8 (not 3) and the x part of the wrapper encoders gain 12, so that deep levels stay visible in the output;
  * in bottleneck.0.weight the U-Net input channels (all but the last `dim`) are scaled by 0.5 and the `dim` feature channels by 4.

  make_weights_hr.py CONFIG.json OUT.safetensors [--only-prefix P] [--skip-prefix P]
CONFIG.decoder_channels = [c0, c1, c2, c3, c4, c5]; the real models have [16, 32, 64, 128, 256, 512].
CONFIG.decoder_only = true: only local_decoder.* exists.
"""
import hashlib, json, math, os, sys
import numpy as np
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for the module beside this one
import make_weights as mw

REAL_CHANNELS = (16, 32, 64, 128, 256, 512)


def decoder_convs(patch, dim, chans=REAL_CHANNELS):
    """[(key without .weight/.bias, in, out, kernel)] of local_decoder, in execution-independent listing order"""
    c0, c1, c2, c3, c4, c5 = chans
    wrap = {64: None, 128: "8k", 160: "10k_a"}[patch]
    r = []
    if wrap:
        r.append((f"enc_{wrap}.0", 3, 3, 3))
    r += [("enc0.0", 3, c0, 3), ("enc0b.0", c0, c1, 3), ("enc1.0", c1, c2, 3), ("enc2.0", c2, c3, 3), ("enc3.0", c3, c4, 3)]
    if patch == 160:
        r += [("bottleneck.0", c4 + dim, c5, 1), ("up3.1", c5, c4, 3)]
    else:
        r += [("enc4.0", c4, c5, 3), ("bottleneck.0", c5 + dim, c5, 1), ("up4.1", c5, c5, 3), ("dec4.0", 2 * c5, c4, 3), ("up3.1", c4, c4, 3)]
    r += [("dec3.0", 2 * c4, c3, 3), ("up2.1", c3, c3, 3), ("dec2.0", 2 * c3, c2, 3), ("up1.1", c2, c2, 3), ("dec1.0", 2 * c2, c1, 3),
          ("up0b.1", c1, c1, 3), ("dec0b.0", 2 * c1, c0, 3), ("up0.1", c0, c0, 3), ("dec0.0", 2 * c0, c0, 3)]
    if wrap:
        r += [(f"up_{wrap}.1", c0, c0, 3), (f"dec_{wrap}.0", c0 + 3, c0, 3)]
    r.append(("out_conv", c0, 3, 1))
    return r


def shapes(c):
    s = {}
    if not c.get("decoder_only"):
        trunk = {k: v for k, v in c.items() if k != "decoder_channels"}
        s = {k: v for k, v in mw.dit_shapes(trunk).items() if not k.startswith("local_decoder.")}
    for k, i, o, n in decoder_convs(c["patch_size"], c["dim"], c["decoder_channels"]):
        s[f"local_decoder.{k}.weight"], s[f"local_decoder.{k}.bias"] = (o, i, n, n), (o,)
    return s


def rule(key, shape):
    if key.startswith("local_decoder.") and key.endswith(".weight"):
        fan_in = shape[1] * shape[2] * shape[3]
        gain = 8.0 if ".up" in key else 12.0 if ".enc_" in key else 3.0 if ".out_conv" in key else 5.0
        return 0.0, math.sqrt(gain / fan_in)
    return mw.rule(key, shape)


def tensor(c, key, shape):
    seed = int.from_bytes(hashlib.sha256(f"{c['set']}|{key}".encode()).digest()[:4], "little")
    centre, half = rule(key, shape)
    v = centre + (2.0 * np.random.RandomState(seed).random_sample(shape) - 1.0) * half
    if key == "local_decoder.bottleneck.0.weight":
        n = shape[1] - c["dim"]
        v[:, :n] *= 0.5
        v[:, n:] *= 4.0
    return np.asarray(v, dtype=np.float32)


def build(c, only_prefix=None, skip_prefix=None):
    return {k: tensor(c, k, v) for k, v in shapes(c).items()
            if (only_prefix is None or k.startswith(only_prefix)) and (skip_prefix is None or not k.startswith(skip_prefix))}


digest = mw.digest

if __name__ == "__main__":
    from safetensors.numpy import save_file
    args, opt, it = [], {}, iter(sys.argv[1:])
    for x in it:
        if x.startswith("--"):
            opt[x[2:].replace("-", "_")] = next(it)
        else:
            args.append(x)
    cfg = json.load(open(args[0]))
    w = build(cfg, **opt)
    print(len(w), "tensors", sum(v.size for v in w.values()), "values", "digest", digest(w))
    if not opt and "digest_all" in cfg:
        print("digest_all", "ok" if digest(w) == cfg["digest_all"] else "MISMATCH")
    save_file(w, args[1])
