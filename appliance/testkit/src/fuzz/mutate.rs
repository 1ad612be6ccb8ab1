//! Changing an input as damage, a peer or a person might.

use crate::Chance;

/// The longest input in bytes that is made.
const LEN_MAX: usize = 4 << 20;

/// Values that lengths, counts and offsets break at.
const EXTREMES: [u64; 18] = [
    0,
    1,
    2,
    7,
    8,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    32_769,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
    1 << 63,
    u64::MAX,
];

/// One of the valid inputs with one to eight changes, or with none in a few cases.
#[must_use]
pub fn mutate(chance: &mut Chance, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = chance.pick(corpus).clone();
    // Most of what is found is one change away from valid.
    let changes = if chance.percent(60) { 1 } else { chance.below(8) };
    for _ in 0..changes {
        change(chance, corpus, &mut bytes);
    }
    bytes.truncate(LEN_MAX);
    bytes
}

/// A place in `len` bytes: anywhere, or near the front where headers are, or near the end.
fn place(chance: &mut Chance, len: usize) -> usize {
    let len = len.max(1) as u64;
    let at = match chance.below(4) {
        0 | 1 => chance.below(len),
        2 => chance.below(len.min(256)),
        _ => len - 1 - chance.below(len.min(64)),
    };
    usize::try_from(at).unwrap_or(0)
}

fn change(chance: &mut Chance, corpus: &[Vec<u8>], bytes: &mut Vec<u8>) {
    let at = place(chance, bytes.len());
    match chance.below(10) {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << chance.below(8);
            }
        }
        2 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = chance.any().to_le_bytes()[0];
            }
        }
        // A field of two, four or eight bytes.
        3..=5 => field(chance, bytes, at),
        6 => bytes.truncate(at),
        7 => {
            let end = (at + place(chance, 64)).min(bytes.len());
            bytes.drain(at.min(end)..end);
        }
        8 => {
            // A part of it once more.
            let end = (at + place(chance, 4096)).min(bytes.len());
            let part = bytes.get(at..end).unwrap_or_default().to_vec();
            let to = place(chance, bytes.len()).min(bytes.len());
            bytes.splice(to..to, part);
        }
        _ => {
            // A part of another one in its place.
            let other = chance.pick(corpus);
            let from = place(chance, other.len());
            let part = other.get(from..(from + place(chance, 4096)).min(other.len()));
            let part = part.unwrap_or_default().to_vec();
            let end = (at + part.len()).min(bytes.len());
            bytes.splice(at.min(end)..end, part);
        }
    }
}

fn field(chance: &mut Chance, bytes: &mut [u8], at: usize) {
    let width = *chance.pick(&[2usize, 4, 8]);
    // Fields mostly lie at even places.
    let at = if chance.percent(70) { at / width * width } else { at };
    let len = bytes.len() as u64;
    let Some(field) = bytes.get_mut(at..at + width) else { return };
    let mut old = [0u8; 8];
    for (to, from) in old.iter_mut().zip(field.iter()) {
        *to = *from;
    }
    let old = u64::from_le_bytes(old);
    let value = match chance.below(6) {
        0..3 => *chance.pick(&EXTREMES),
        3 => old.wrapping_add(chance.below(9)).wrapping_sub(4),
        4 => len.wrapping_add(chance.below(9)).wrapping_sub(4),
        _ => chance.any(),
    };
    for (to, from) in field.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}
