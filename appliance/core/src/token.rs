//! The one-time token: 120 secret bits and 5 check bits as 25 characters of Crockford's base 32,
//! in groups of five, meant to be typed at a hypervisor's console.
//!
//! The check character makes a Reed-Solomon code of distance two over GF(32) in which every
//! position has its own weight: any one wrong character and any two characters swapped are found
//! before anything is sent. The alphabet is <https://www.crockford.com/base32.html>.

use alloc::string::String;
use core::fmt;

/// Bytes of secret.
pub const SECRET_LEN: usize = 15;

/// Characters without the dashes.
pub const TOKEN_CHARS: usize = 25;

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// A token's secret. It prints only through [`Token::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    secret: [u8; SECRET_LEN],
}

/// Why a typed text is not a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MistypedToken {
    /// It has another number of characters.
    #[error("mistyped token: it has {0} characters, a token has {TOKEN_CHARS}")]
    Length(usize),
    /// It has a character which no token has.
    #[error("mistyped token: it has the character {0:?}, which no token has")]
    Character(char),
    /// The check character does not fit.
    #[error(
        "mistyped token: the check digit does not fit; a character is wrong or two are swapped"
    )]
    Check,
}

impl Token {
    /// A token from fresh entropy.
    #[must_use]
    pub const fn new(secret: [u8; SECRET_LEN]) -> Self {
        Self { secret }
    }

    /// The secret bytes, for the proof of possession only.
    #[must_use]
    pub const fn secret(&self) -> &[u8; SECRET_LEN] {
        &self.secret
    }

    /// The text to show once to the administrator: `XXXXX-XXXXX-XXXXX-XXXXX-XXXXX`.
    #[must_use]
    pub fn reveal(&self) -> String {
        let data = self.symbols();
        let mut text = String::with_capacity(TOKEN_CHARS + 4);
        for (at, symbol) in data.iter().chain(&[check_symbol(&data)]).enumerate() {
            if at > 0 && at % 5 == 0 {
                text.push('-');
            }
            text.push(char::from(*ALPHABET.get(usize::from(*symbol)).unwrap_or(&b'?')));
        }
        text
    }

    /// Reads what a person typed: any case, dashes and blanks anywhere, O for 0, I and L for 1.
    ///
    /// # Errors
    /// [`MistypedToken`]; nothing needs to be asked of a peer to know.
    pub fn parse(text: &str) -> Result<Self, MistypedToken> {
        let mut symbols = [0u8; TOKEN_CHARS];
        let mut count = 0;
        for typed in text.trim().chars().filter(|c| !matches!(c, '-' | ' ' | '\t')) {
            let symbol = symbol_of(typed).ok_or(MistypedToken::Character(typed))?;
            if let Some(slot) = symbols.get_mut(count) {
                *slot = symbol;
            }
            count += 1;
        }
        if count != TOKEN_CHARS {
            return Err(MistypedToken::Length(count));
        }
        let [data @ .., check] = symbols;
        if check_symbol(&data) != check {
            return Err(MistypedToken::Check);
        }
        let mut secret = [0u8; SECRET_LEN];
        for (bytes, group) in secret.chunks_exact_mut(5).zip(data.chunks_exact(8)) {
            let bits = group.iter().fold(0u64, |bits, symbol| (bits << 5) | u64::from(*symbol));
            for (byte, value) in bytes.iter_mut().zip(bits.to_be_bytes().into_iter().skip(3)) {
                *byte = value;
            }
        }
        Ok(Self { secret })
    }

    /// The 24 data symbols: five bytes make eight of them, most significant first.
    fn symbols(&self) -> [u8; TOKEN_CHARS - 1] {
        let mut symbols = [0u8; TOKEN_CHARS - 1];
        for (bytes, group) in self.secret.chunks_exact(5).zip(symbols.chunks_exact_mut(8)) {
            let bits = bytes.iter().fold(0u64, |bits, byte| (bits << 8) | u64::from(*byte));
            for (at, symbol) in group.iter_mut().enumerate() {
                let [low, ..] = (bits >> (35 - 5 * at)).to_le_bytes();
                *symbol = low & 31;
            }
        }
        symbols
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

fn symbol_of(typed: char) -> Option<u8> {
    let upper = match typed.to_ascii_uppercase() {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let at = ALPHABET.iter().position(|symbol| char::from(*symbol) == upper)?;
    u8::try_from(at).ok()
}

/// The sum of `weight^position * symbol` over GF(32), where the weight is a primitive element, so
/// that all positions have different weights and none is zero.
fn check_symbol(data: &[u8; TOKEN_CHARS - 1]) -> u8 {
    // Horner's rule from the last position; the check symbol itself has weight one.
    data.iter().fold(0, |acc, symbol| times_alpha(acc ^ symbol))
}

/// Multiplies by the primitive element x of GF(2)[x] / (x^5 + x^2 + 1).
const fn times_alpha(value: u8) -> u8 {
    let shifted = value << 1;
    if shifted & 0x20 == 0 { shifted } else { (shifted ^ 0x25) & 0x1f }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const SECRET: [u8; SECRET_LEN] = [0, 1, 2, 3, 0xff, 0xfe, 9, 8, 7, 0x80, 0x7f, 3, 2, 1, 0x55];

    fn typed() -> Vec<char> {
        Token::new(SECRET).reveal().replace('-', "").chars().collect()
    }
    fn parse(chars: &[char]) -> Result<Token, MistypedToken> {
        Token::parse(&chars.iter().collect::<String>())
    }

    #[test]
    fn text_is_pinned_and_round_trips() {
        let text = Token::new(SECRET).reveal();
        assert_eq!(text.len(), 29);
        assert_eq!(text, "000G4-0ZZZR-4GG1W-0FW1G-40AN0");
        let sloppy = text.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l");
        for text in [&text, &sloppy, &text.replace('-', "")] {
            assert_eq!(Token::parse(text).map(|t| t.secret), Ok(SECRET), "{text}");
        }
    }

    #[test]
    fn check_characters_are_pinned() {
        for (secret, text) in [
            ([0; SECRET_LEN], "00000-00000-00000-00000-00000"),
            ([0xff; SECRET_LEN], "ZZZZZ-ZZZZZ-ZZZZZ-ZZZZZ-ZZZZW"),
            (*b"srn token fixed", "EDS6W-83MDX-NPAVH-0CSMQ-GSB4V"),
        ] {
            assert_eq!(Token::new(secret).reveal(), text);
        }
    }

    #[test]
    fn every_single_typo_is_found() {
        let good = typed();
        for at in 0..TOKEN_CHARS {
            for symbol in ALPHABET {
                let mut bad = good.clone();
                bad[at] = char::from(*symbol);
                assert_eq!(parse(&bad).is_ok(), bad == good, "{bad:?}");
            }
        }
    }

    #[test]
    fn every_swap_is_found() {
        let good = typed();
        for a in 0..TOKEN_CHARS {
            for b in 0..a {
                let mut bad = good.clone();
                bad.swap(a, b);
                assert_eq!(parse(&bad).is_ok(), bad == good, "{a} {b}");
            }
        }
    }

    #[test]
    fn wrong_texts_are_told_apart() {
        assert_eq!(Token::parse("").unwrap_err(), MistypedToken::Length(0));
        assert_eq!(parse(&typed()[1..]).unwrap_err(), MistypedToken::Length(24));
        let mut long = typed();
        long.extend(['0'; 1000]);
        assert_eq!(parse(&long).unwrap_err(), MistypedToken::Length(1025));
        assert_eq!(Token::parse("U").unwrap_err(), MistypedToken::Character('U'));
        assert_eq!(Token::parse("\u{e9}").unwrap_err(), MistypedToken::Character('\u{e9}'));
    }

    #[test]
    fn debug_shows_no_secret() {
        assert_eq!(alloc::format!("{:?}", Token::new(SECRET)), "Token(secret)");
    }
}
