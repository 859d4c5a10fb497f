"""Every model's `match` in its published or plain form: one caption at a time against all pictures, every context and message formed.

Same codes in, same scores out as the library's; only the arithmetic differs. SCAN and CAMP follow the released codes (CAMP pads every caption to 50
tokens, as released); CMSEI, Hire and SSAMT never had public code, their plain forms are their lessons' equations written out.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imtm_lite.attention import masked_softmax
from imtm_lite.encoders import Codes, Matcher

CAMP_TOKENS = 50


def look(t: Tensor,       # (B, T, D) what asks
         v: Tensor,       # (B, R, D) what answers
         there: Tensor,   # (B, R) bool
         temperature: float) -> Tensor: # (B, T, D)
    "SCAN's attention: the contexts of all words, formed, without the copies of the released code."
    s = F.leaky_relu(v @ t.transpose(1, 2), .1)                                   # (B, R, T)
    s = s / s.norm(dim=2, keepdim=True).clamp(min=1e-8)
    return masked_softmax(temperature * s.transpose(1, 2), there[:, None]) @ v


def each_caption(images: Codes, captions: Codes):
    "The words of one caption after the other, once for every picture: (B, T, D)."
    for c, n in enumerate(captions.mask.sum(1).tolist()): yield c, captions.x[c, :n].expand(len(images), n, captions.x.shape[2])


def vse(matcher: Matcher, images: Codes, captions: Codes) -> Tensor: # (B, C), like all below
    return torch.stack([F.cosine_similarity(images.vector, s[None]) for s in captions.vector], 1)


def scan(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "As released, copies included: the words repeated for every picture, transposed weights and contexts written out, three reductions for a cosine."
    columns = []
    for _, t in each_caption(images, captions):
        t, v = t.contiguous(), images.x
        ways = []
        for way, temperature in matcher.temperatures.items():
            x, y, asks, answers = (t, v, None, images.mask) if way == 't2i' else (v, t, images.mask, None)
            s = F.leaky_relu(y @ x.transpose(1, 2), .1)                            # (B, K, L)
            s = s / s.norm(dim=2, keepdim=True).clamp(min=1e-8)
            logits = temperature * s.transpose(1, 2).contiguous()                  # (B, L, K)
            a = logits.softmax(-1) if answers is None else masked_softmax(logits, answers[:, None])
            context = (y.transpose(1, 2) @ a.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
            agreed = (x * context).sum(2) / (x.norm(dim=2) * context.norm(dim=2)).clamp(min=1e-8)
            ways.append(agreed.mean(1) if asks is None else (agreed * asks).sum(1) / asks.sum(1))
        columns.append(sum(ways) / len(ways))
    return torch.stack(columns, 1)


def transformer_layer(layer, x: Tensor, sees: Tensor) -> Tensor: # (B, n, D), (B, n, n) bool -> (B, n, D)
    "A pre-norm layer of PyTorch's, written out, without dropout."
    attention, (B, n, D) = layer.self_attn, x.shape
    heads = attention.num_heads
    y = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (part.view(B, n, heads, D // heads).transpose(1, 2) for part in y.chunk(3, -1))
    weights = masked_softmax(query @ key.transpose(2, 3) / math.sqrt(D // heads), sees[:, None])
    x = x + attention.out_proj((weights @ value).transpose(1, 2).reshape(B, n, D))
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))


def ssamt(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "Every pair's nodes through every layer, and the cosines one after the other."
    columns, mu1, mu2 = [], *matcher.config['mu']
    for c in range(len(captions)):
        t = captions[[c] * len(images)]
        x, sees = matcher.nodes(images, t)
        for layer in matcher.inter.layers: x = transformer_layer(layer, x, sees)
        x = matcher.inter.norm(x)
        P, T = t.exists.shape[1], t.mask.shape[1]
        sentence, units, picture, seen = x[:, :1], x[:, 1:1 + P + T], x[:, 1 + P + T, None], x[:, 2 + P + T:]
        there = torch.cat([t.exists, t.mask], 1)
        whole = F.cosine_similarity(picture[:, 0], sentence[:, 0], dim=-1)
        of_units = (F.cosine_similarity(picture, units, dim=-1) * there).sum(1) / there.sum(1)
        of_regions = (F.cosine_similarity(sentence, seen, dim=-1) * images.mask).sum(1) / images.mask.sum(1)
        first = F.cosine_similarity(images.vector, t.vector, dim=-1)
        columns.append(first + mu1 * whole + mu2 * (of_units + of_regions))
    return torch.stack(columns, 1)


def cmsei(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "Every message and every refined vector formed."
    def scan_weights(x, y, there, temperature): # (B, L, D), (B, K, D) -> (B, L, K)
        s = F.leaky_relu(x @ y.transpose(1, 2), .1)
        s = s / s.norm(dim=1, keepdim=True).clamp(min=1e-8)
        return masked_softmax(temperature * s, there[:, None])

    def told(x, message, gate): # (B, L, D), (B, L or 1, D) -> (B, L, D)
        message = F.normalize(message, dim=-1)
        loud = matcher.gate[gate](F.cosine_similarity(x, message, dim=-1))
        return x + loud[..., None] * message

    columns, v, there = [], images.x, images.mask
    counts = there.to(v.dtype) / there.sum(1, keepdim=True)                        # (B, R)
    picture = (v * counts[..., None]).sum(1, keepdim=True)                         # (B, 1, D)
    for _, t in each_caption(images, captions):
        over_regions = scan_weights(t, v, there, matcher.config['temperature'])    # (B, T, R)
        over_words = scan_weights(v, t, torch.ones_like(t[..., 0]).bool(), matcher.config['object_temperature'])
        objects, words = told(v, over_words @ t, 'object'), told(t, over_regions @ v, 'word')
        objects, words = told(objects, t.mean(1, keepdim=True), 'sentence'), told(words, picture, 'image')
        by_word = F.cosine_similarity(words, over_regions @ objects, dim=-1)       # (B, T)
        by_object = F.cosine_similarity(objects, over_words @ words, dim=-1)       # (B, R)
        columns.append((by_word.mean(1) + (by_object * counts).sum(1)) / 2)
    return torch.stack(columns, 1)


def camp(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    unit = lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-8)
    scale = math.sqrt(images.x.shape[2])

    def side(x, x_there, y, y_there, x_side, y_side, fusion, pool): # (B, L, D) each
        m = masked_softmax(x_side.query(x) @ y_side.key(y).transpose(1, 2) / scale, y_there[:, None]) @ y
        inner = masked_softmax(y_side.message_query(m) @ y_side.message_key(m).transpose(1, 2) / scale, x_there[:, None])
        m = unit(inner @ m)
        fused = F.relu(fusion.linear(torch.cat((x, m), -1) * torch.sigmoid((x * m).sum(-1, keepdim=True)))) + x
        return unit(pool(fused, x_there))

    columns, v, B = [], images.x, len(images)
    for c in range(len(captions)):
        n = min(captions.x.shape[1], CAMP_TOKENS)
        t, there = (F.pad(a, (0, 0) * (a.ndim - 2) + (0, CAMP_TOKENS - n)) for a in (captions.x[c:c + 1, :n], captions.mask[c:c + 1, :n]))
        t, there = t.expand(B, CAMP_TOKENS, -1), there.expand(B, CAMP_TOKENS)
        a = side(v, images.mask, t, there, matcher.image_side, matcher.word_side, matcher.image_fusion, matcher.image_pool)
        b = side(t, there, v, images.mask, matcher.word_side, matcher.image_side, matcher.word_fusion, matcher.word_pool)
        columns.append(torch.sigmoid(matcher.head(torch.cat((a, b), -1))[:, 0]))
    return torch.stack(columns, 1)


PLAIN = {'vse': vse, 'scan': scan, 'scan both': scan, 'camp': camp, 'ssamt': ssamt, 'cmsei': cmsei, 'hire': cmsei}
FORMS = {'scan both': ('scan', dict(direction='both'))} # name of a row -> model, arguments; all others are models as they are


def form(name: str) -> tuple[str, dict]:
    "The model of a row, and its arguments."
    return FORMS.get(name, (name, {}))
