"""Every model's `match` in its published or plain form.

One caption at a time against all pictures, every context, message and position of every pair
formed. Same codes in, same scores out as the library's; only the arithmetic differs.

SCAN and the released CAMP follow the released codes (CAMP pads every caption to 50 tokens, as
released). CAMP as in the paper, SSAMT, CMSEI and Hire never had public code: their plain forms
are the equations of their lessons, written out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from imtm_lite.attention import masked_softmax
from imtm_lite.encoders import Codes, Matcher

CAMP_TOKENS = 50  # to which the release pads


def scan_weights(
    x: Tensor,  # (B, L, D) who asks
    y: Tensor,  # (B, K, D) who answers
    there: Tensor,  # (B, K) bool: answers that exist
    temperature: float,
) -> Tensor:  # (B, L, K)
    "SCAN's attention, after the released code; everybody who asks exists."
    affinity = F.leaky_relu(x @ y.transpose(1, 2), 0.1)
    affinity = affinity / affinity.norm(dim=1, keepdim=True).clamp(min=1e-8)
    return masked_softmax(temperature * affinity, there[:, None])


def all_there(x: Tensor) -> Tensor:  # (B, L, D) -> (B, L) bool
    return torch.ones_like(x[..., 0], dtype=torch.bool)


def each_caption(images: Codes, captions: Codes):
    "The words of one caption after the other, once for every picture: (B, T, D)."
    for c, n in enumerate(captions.mask.sum(1).tolist()):
        yield c, captions.x[c, :n].expand(len(images), n, captions.x.shape[2])


def vse(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:  # (B, C), like all below
    columns = []
    for sentence in captions.vector:
        columns.append(F.cosine_similarity(images.vector, sentence[None]))
    return torch.stack(columns, 1)


def scan_way(
    x: Tensor,  # (B, L, D) who asks
    x_there: Tensor | None,  # (B, L) bool; None: all of them exist
    y: Tensor,  # (B, K, D) who answers
    y_there: Tensor | None,  # (B, K) bool; None: all of them exist
    temperature: float,
) -> Tensor:  # (B,)
    "One direction as released, copies included: weights, contexts, a cosine of three sums."
    affinity = F.leaky_relu(y @ x.transpose(1, 2), 0.1)  # (B, K, L)
    affinity = affinity / affinity.norm(dim=2, keepdim=True).clamp(min=1e-8)
    logits = temperature * affinity.transpose(1, 2).contiguous()  # (B, L, K)
    weights = logits.softmax(-1) if y_there is None else masked_softmax(logits, y_there[:, None])
    context = y.transpose(1, 2) @ weights.transpose(1, 2).contiguous()  # (B, D, L)
    context = context.transpose(1, 2).contiguous()
    lengths = x.norm(dim=2) * context.norm(dim=2)
    agreed = (x * context).sum(2) / lengths.clamp(min=1e-8)  # (B, L)
    if x_there is None:
        return agreed.mean(1)
    return (agreed * x_there).sum(1) / x_there.sum(1)


def scan(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "As released: the words of a caption repeated for every picture."
    columns = []
    v = images.x
    for _, t in each_caption(images, captions):
        t = t.contiguous()
        sides = dict(t2i=(t, None, v, images.mask), i2t=(v, images.mask, t, None))
        ways = []
        for way, temperature in matcher.temperatures.items():
            ways.append(scan_way(*sides[way], temperature))
        columns.append(sum(ways) / len(ways))
    return torch.stack(columns, 1)


def camp_side(
    x: Tensor,  # (B, L, D) who hears
    x_there: Tensor,  # (B, L) bool
    y: Tensor,  # (B, K, D) who speaks
    y_there: Tensor,  # (B, K) bool
    affinity: Tensor,  # (B, L, K)
    fusion,
    pool,
) -> Tensor:  # (B, D)
    "One side of a pair as one vector, after its messages."
    scale = math.sqrt(x.shape[2])
    weights = masked_softmax(affinity / scale, y_there[:, None])
    message = weights @ y  # (B, L, D)
    products = x * message
    if fusion.gate == 'elementwise':
        gate = torch.sigmoid(products)  # (B, L, D)
    else:
        dots = products.sum(-1, keepdim=True)  # (B, L, 1)
        gate = torch.sigmoid(fusion.gate_scale * dots)
    fused = F.relu(fusion.linear(gate * (x + message))) + x
    share = masked_softmax(pool.logits(fused)[..., 0] / scale, x_there)  # (B, L)
    return (share[..., None] * fused).sum(1)


def camp(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "As in the paper (eq. 1 to 12), with element-wise or scalar gates; projected once an item."
    columns = []
    v = images.x
    v_there = images.mask
    for c, t in each_caption(images, captions):
        words = captions.projected[c, : t.shape[1]].expand(len(images), -1, -1)  # (B, T, D)
        affinity = images.projected @ words.transpose(1, 2)  # (B, R, T)
        t_there = all_there(t)
        image_parts = matcher.image_fusion, matcher.image_pool
        word_parts = matcher.word_fusion, matcher.word_pool
        a = camp_side(v, v_there, t, t_there, affinity, *image_parts)
        b = camp_side(t, t_there, v, v_there, affinity.mT, *word_parts)
        logits = matcher.head.out(F.relu(matcher.head.hidden(a + b)))  # (B, 1)
        columns.append(torch.sigmoid(logits[:, 0]))
    return torch.stack(columns, 1)


def released_unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def released_side(
    x: Tensor,  # (B, L, D) who hears
    x_there: Tensor,  # (B, L) bool
    y: Tensor,  # (B, K, D) who speaks
    y_there: Tensor,  # (B, K) bool
    x_layers,
    y_layers,
    fusion,
    pool,
) -> Tensor:  # (B, D)
    "Two levels of messages, a gate, a fusion and four heads."
    scale = math.sqrt(x.shape[2])
    first = x_layers.query(x) @ y_layers.key(y).transpose(1, 2) / scale  # (B, L, K)
    message = masked_softmax(first, y_there[:, None]) @ y  # (B, L, D)
    asking = y_layers.message_query(message)
    answering = y_layers.message_key(message)
    among = asking @ answering.transpose(1, 2) / scale  # (B, L, L)
    message = released_unit(masked_softmax(among, x_there[:, None]) @ message)
    gate = torch.sigmoid((x * message).sum(-1, keepdim=True))  # (B, L, 1)
    fused = F.relu(fusion.linear(torch.cat((x, message), -1) * gate)) + x
    return released_unit(pool(fused, x_there))


def camp_released(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "As released: captions padded to 50 tokens, projected anew for every caption."
    columns = []
    v = images.x
    v_there = images.mask
    B = len(images)
    n = min(captions.x.shape[1], CAMP_TOKENS)
    words = matcher.messages.words
    regions = matcher.messages.regions
    image_parts = matcher.image_fusion, matcher.image_pool
    word_parts = matcher.word_fusion, matcher.word_pool
    for c in range(len(captions)):
        t = F.pad(captions.x[c, :n], (0, 0, 0, CAMP_TOKENS - n)).expand(B, -1, -1)  # (B, 50, D)
        t_there = F.pad(captions.mask[c, :n], (0, CAMP_TOKENS - n)).expand(B, -1)  # (B, 50)
        a = released_side(v, v_there, t, t_there, regions, words, *image_parts)
        b = released_side(t, t_there, v, v_there, words, regions, *word_parts)
        columns.append(torch.sigmoid(matcher.head(a, b)))
    return torch.stack(columns, 1)


def transformer_layer(
    layer,
    x: Tensor,  # (B, n, D)
    sees: Tensor,  # (B, n, n) bool
) -> Tensor:  # (B, n, D)
    "A pre-norm layer of PyTorch's, written out, without dropout."
    B, n, D = x.shape
    attention = layer.self_attn
    heads = attention.num_heads
    y = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)  # (B, n, 3 D)
    # (B, heads, n, D / heads)
    query, key, value = y.view(B, n, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    weights = masked_softmax(query @ key.transpose(2, 3) / math.sqrt(D // heads), sees[:, None])
    x = x + attention.out_proj((weights @ value).transpose(1, 2).reshape(B, n, D))
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))


def cut(caption: Codes) -> Codes:  # of one caption
    "Without the padding of its words and phrases."
    used = caption.exists[0].nonzero()
    P = int(used[-1]) + 1 if len(used) else 0
    T = int(caption.mask.sum())
    return Codes(
        vector=caption.vector,
        phrases=caption.phrases[:, :P],
        exists=caption.exists[:, :P],
        x=caption.x[:, :T],
        mask=caption.mask[:, :T],
        own=caption.own[:, :T, :P],
    )


def ssamt_pairs(
    matcher: Matcher,
    images: Codes,  # of B pictures
    captions: Codes,  # of B captions, without padding
) -> Tensor:  # (B,)
    "Every pair's nodes through every layer, and the cosines one after the other."
    P = captions.exists.shape[1]
    T = captions.mask.shape[1]
    # (B, 2 + P + T + R, D)
    x, sees = matcher.nodes(images, captions)
    for layer in matcher.inter.layers:
        x = transformer_layer(layer, x, sees)
    x = matcher.inter.norm(x)
    sentence, units, picture, regions = x.split([1, P + T, 1, images.x.shape[1]], 1)
    there = torch.cat([captions.exists, captions.mask], 1)  # (B, P + T)
    whole = F.cosine_similarity(picture, sentence, dim=-1)[:, 0]  # (B,)
    of_units = F.cosine_similarity(picture, units, dim=-1) * there
    of_regions = F.cosine_similarity(sentence, regions, dim=-1) * images.mask
    local = of_units.sum(1) / there.sum(1) + of_regions.sum(1) / images.mask.sum(1)
    first = F.cosine_similarity(images.vector, captions.vector, dim=-1)
    mu1, mu2 = matcher.config['mu']
    return first + mu1 * whole + mu2 * local


def ssamt(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "Every pair goes through the inter transformer."
    columns = []
    for c in range(len(captions)):
        repeated = cut(captions[c : c + 1])[[0] * len(images)]
        columns.append(ssamt_pairs(matcher, images, repeated))
    return torch.stack(columns, 1)


def told(
    matcher: Matcher,
    x: Tensor,  # (B, L, D) who hears
    message: Tensor,  # (B, L or 1, D)
    gate: str,
) -> Tensor:  # (B, L, D)
    "What hears a message, refined by it."
    message = F.normalize(message, dim=-1)
    loud = matcher.gate[gate](F.cosine_similarity(x, message, dim=-1))
    return x + loud[..., None] * message


def cmsei(matcher: Matcher, images: Codes, captions: Codes) -> Tensor:
    "Every message and every refined vector formed."
    word_temperature = matcher.config['temperature']
    object_temperature = matcher.config['object_temperature']
    columns = []
    v = images.x
    counts = images.mask.to(v.dtype) / images.mask.sum(1, keepdim=True)  # (B, R)
    picture = (v * counts[..., None]).sum(1, keepdim=True)  # (B, 1, D)
    for _, t in each_caption(images, captions):
        over_regions = scan_weights(t, v, images.mask, word_temperature)  # (B, T, R)
        over_words = scan_weights(v, t, all_there(t), object_temperature)  # (B, R, T)
        objects = told(matcher, v, over_words @ t, 'object')
        words = told(matcher, t, over_regions @ v, 'word')
        objects = told(matcher, objects, t.mean(1, keepdim=True), 'sentence')
        words = told(matcher, words, picture, 'image')
        by_word = F.cosine_similarity(words, over_regions @ objects, dim=-1)  # (B, T)
        by_object = F.cosine_similarity(objects, over_words @ words, dim=-1)  # (B, R)
        columns.append((by_word.mean(1) + (by_object * counts).sum(1)) / 2)
    return torch.stack(columns, 1)


PLAIN = {  # name of a row -> its plain form
    'vse': vse,
    'scan': scan,
    'scan both': scan,
    'camp': camp,
    'camp scalar gates': camp,
    'camp released': camp_released,
    'ssamt': ssamt,
    'cmsei': cmsei,
    'hire': cmsei,
}
FORMS = {  # name of a row -> model, arguments; all others are models as they are
    'scan both': ('scan', dict(direction='both')),
    'camp scalar gates': ('camp', dict(gate='scalar')),
    'camp released': ('camp', dict(form='released')),
    # for training alone:
    'camp stage 1': ('camp-stage1', {}),
    'ssamt phase 1': ('ssamt-intra', {}),
    'ssamt phase 2': ('ssamt', {}),
}


def form(name: str) -> tuple[str, dict]:
    "The model of a row, and its arguments."
    return FORMS.get(name, (name, {}))
