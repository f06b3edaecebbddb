//! Takes requests whatever their client calls the agent: an `:authority` that the HTTP library would refuse is mended.
//!
//! A gRPC client of a Unix socket, as a proxy of the vsock is one, may take the socket's path for the server's name and
//! percent-encode it (C-core and with it Python's gRPC: `run%2Fagent.sock`). hyper's libraries end such a call with
//! `PROTOCOL_ERROR`, as no host's name has a `%`. Nothing here depends on the name, so each character that is in nobody's
//! way elsewhere but not in a name becomes another one, in place: with a code as long as its own, so that HPACK's tables
//! (RFC 7541) stay alike on both sides.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use prost::bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes of the words with which a client of HTTP/2 starts (RFC 9113, 3.4), and of a frame's header (4.1).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;

/// The type of a frame that starts a request, and its flags (6.2).
const HEADERS: u8 = 1;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// The largest frame that a server takes which does not say otherwise (6.5.2).
const LARGEST: usize = 16 * 1024;

/// Bytes read at once.
const CHUNK: usize = 16 * 1024;

/// What a client sends, on its way to the HTTP library.
pub struct Inbound {
    /// Read from the client, and not handed on.
    held: BytesMut,
    /// Bytes of `held` that may be handed on.
    ready: usize,
    /// Bytes still to come of a frame that needs no look, or of the preface.
    passing: usize,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            held: BytesMut::new(),
            ready: 0,
            passing: PREFACE,
        }
    }
}

impl Inbound {
    /// Reads from the client's `stream`, as [`AsyncRead::poll_read`] does. The start of a request is held back until
    /// all of its first frame is there.
    pub fn poll_read(
        &mut self,
        mut stream: Pin<&mut impl AsyncRead>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.ready == 0 {
            let mut chunk = [0; CHUNK];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(stream.as_mut().poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                self.ready = self.held.len();
                break;
            }
            self.held.extend_from_slice(chunk.filled());
            self.look();
        }
        let length = self.ready.min(buf.remaining());
        buf.put_slice(&self.held[..length]);
        self.held.advance(length);
        self.ready -= length;
        Poll::Ready(Ok(()))
    }

    fn look(&mut self) {
        loop {
            let rest = &mut self.held[self.ready..];
            let passed = self.passing.min(rest.len());
            if passed > 0 {
                self.ready += passed;
                self.passing -= passed;
                continue;
            }
            let &[a, b, c, kind, flags, ..] = &*rest else { return };
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if rest.len() < FRAME_HEADER {
                return;
            }
            if kind != HEADERS || length > LARGEST {
                self.passing = FRAME_HEADER + length;
            } else if let Some(payload) = rest.get_mut(FRAME_HEADER..FRAME_HEADER + length) {
                mend(payload, flags);
                self.ready += FRAME_HEADER + length;
            } else {
                return;
            }
        }
    }
}

/// Mends the authority in the payload of a HEADERS frame. One that is cut or malformed is left to the library.
fn mend(payload: &mut [u8], flags: u8) {
    let (mut start, mut end) = (0, payload.len());
    if flags & PADDED != 0 {
        let padding = payload.first().copied().unwrap_or(0);
        (start, end) = (1, end.saturating_sub(padding.into()));
    }
    if flags & PRIORITY != 0 {
        start += 5;
    }
    let Some(block) = payload.get_mut(start..end) else {
        return;
    };
    if let Some(Text { bytes, huffman }) = authority(block) {
        if huffman {
            mend_huffman(&mut block[bytes]);
        } else {
            for byte in &mut block[bytes] {
                if !plain(*byte) {
                    *byte = b'-';
                }
            }
        }
    }
}

/// Whether a name may have the character, wherever it stands.
fn plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

/// A string in a header block.
struct Text {
    bytes: Range<usize>,
    huffman: bool,
}

/// Where a header block has the value of `:authority`, if it is spelled out there (RFC 7541, 6).
fn authority(block: &[u8]) -> Option<Text> {
    const STATIC_INDEX: usize = 1;
    let mut at = 0;
    loop {
        let (prefix, has_value) = match *block.get(at)? {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index = integer(block, &mut at, prefix)?;
        if has_value {
            let is_authority = if index == 0 {
                let name = text(block, &mut at)?;
                !name.huffman && &block[name.bytes] == b":authority"
            } else {
                index == STATIC_INDEX
            };
            let value = text(block, &mut at)?;
            if is_authority {
                return Some(value);
            }
        }
    }
}

/// The string at `at` (5.2), which then is behind it.
fn text(block: &[u8], at: &mut usize) -> Option<Text> {
    let huffman = block.get(*at)? & 0x80 != 0;
    let length = integer(block, at, 7)?;
    let bytes = *at..at.checked_add(length)?;
    block.get(bytes.clone())?;
    *at = bytes.end;
    Some(Text { bytes, huffman })
}

/// The number at `at` (5.1), whose first byte has `prefix` bits of it. More than 28 further bits are no length.
fn integer(block: &[u8], at: &mut usize, prefix: u32) -> Option<usize> {
    let limit = (1 << prefix) - 1;
    let mut next = || {
        let byte = block.get(*at).copied();
        *at += 1;
        byte.map(usize::from)
    };
    let mut number = next()? & limit;
    if number < limit {
        return Some(number);
    }
    for shift in [0, 7, 14, 21] {
        let byte = next()?;
        number += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The Huffman code (appendix B) of what a name may be made of: bits, and the characters in the order of their codes,
/// which follow one another.
const CODES: [(u32, &[u8]); 10] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
];

/// Makes the characters of a string plain, as far as there is a plain one with a code of the same length.
fn mend_huffman(string: &mut [u8]) {
    let (mut code, mut bits) = (0, 0);
    for at in 0..string.len() * 8 {
        code = code << 1 | u32::from(string[at / 8] >> (7 - at % 8) & 1);
        bits += 1;
        // The first code of each length: the one after the last shorter one, longer by zeros.
        let (mut first, mut shorter) = (0, 0);
        let mut found = None;
        for (length, characters) in CODES {
            first <<= length - shorter;
            shorter = length;
            if length == bits && code >= first {
                found = characters
                    .get((code - first) as usize)
                    .map(|found| (*found, characters));
                break;
            }
            first += u32::try_from(characters.len()).unwrap_or_default();
        }
        if let Some((character, alike)) = found {
            if !plain(character)
                && let Some(position) = alike.iter().position(|other| plain(*other))
            {
                let substitute = first + u32::try_from(position).unwrap_or_default();
                for bit in 0..bits {
                    let (at, mask) = (at - bit as usize, substitute >> bit & 1);
                    let place = 7 - at % 8;
                    string[at / 8] = string[at / 8] & !(1 << place) | u8::from(mask == 1) << place;
                }
            }
            (code, bits) = (0, 0);
        } else if bits > 15 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn literal(first: &[u8], value: &[u8], huffman: bool) -> Vec<u8> {
        let mut length = vec![if huffman { 0xff } else { 0x7f }, 0];
        let short = u8::try_from(value.len()).unwrap();
        if short < 127 {
            length = vec![short | if huffman { 0x80 } else { 0 }];
        } else {
            length[1] = short - 127;
        }
        [first, &length, value].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// What comes out when `sent` comes in, in pieces of `size`.
    async fn through(sent: &[u8], size: usize) -> Vec<u8> {
        struct Mended<T>(Inbound, T);
        impl<T: AsyncRead + Unpin> AsyncRead for Mended<T> {
            fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                let Self(inbound, stream) = self.get_mut();
                inbound.poll_read(Pin::new(stream), cx, buf)
            }
        }
        let (mut ours, theirs) = tokio::io::duplex(size);
        let sent = sent.to_vec();
        let sending = tokio::spawn(async move { ours.write_all(&sent).await.unwrap() });
        let mut arrived = Vec::new();
        Mended(Inbound::default(), theirs)
            .read_to_end(&mut arrived)
            .await
            .unwrap();
        sending.await.unwrap();
        arrived
    }

    fn preface() -> Vec<u8> {
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()
    }

    /// A request as C-core starts one: the names spelled out, `:method` and `:scheme` from the table.
    fn request(authority: &[u8], huffman: bool) -> Vec<u8> {
        let path = literal(b"\x40\x05:path", b"/p%2F", false);
        let authority = literal(b"\x40\x0a:authority", authority, huffman);
        [&path[..], &authority, b"\x83\x86"].concat()
    }

    #[tokio::test]
    async fn an_authority_is_mended_and_nothing_else_is_touched() {
        let long = [b"run%2F".repeat(30), b"agent.sock".to_vec()].concat();
        let long_mended = String::from_utf8(long.clone()).unwrap().replace('%', "-").into_bytes();
        for (sent, mended) in [
            (&b"tmp%2Fagent-1.sock"[..], &b"tmp-2Fagent-1.sock"[..]),
            (b"/run/agent.sock", b"-run-agent.sock"),
            (b"localhost", b"localhost"),
            (&long, &long_mended),
        ] {
            // In the middle of a block, after a change of the table's size, and with the name from the table.
            for start in [&b""[..], b"\x3f\xe1\x1f"] {
                let build = |authority: &[u8]| {
                    let block = [start, &request(authority, false)].concat();
                    let indexed = literal(b"\x83\x01", authority, false);
                    let padded = [&[3, 0, 0, 0, 0, 16][..], &indexed, b"%%%"].concat();
                    [
                        preface(),
                        frame(4, 0, b""),
                        frame(HEADERS, 4, &block),
                        frame(0, 1, &request(b"%2F", false)),
                        frame(HEADERS, 4 | PADDED | PRIORITY, &padded),
                        frame(9, 4, &block[..2]),
                    ]
                    .concat()
                };
                for size in [1, 7, 1 << 16] {
                    assert_eq!(through(&build(sent), size).await, build(mended), "{size}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_huffman_coded_authority_is_mended_too() {
        // As Go's and Java's clients code it; by RFC 7541, appendix B: '%' is 010101, '-' 010110, 'a' 00011, ':' 1011100.
        let coded = |percent: &str, colon: &str| {
            let bits = format!("00011{percent}00011{percent}{colon}00011");
            let bits = format!("{bits:1<40}");
            let byte = |at: usize| u8::from_str_radix(&bits[8 * at..8 * at + 8], 2).unwrap();
            (0..5).map(byte).collect::<Vec<u8>>()
        };
        let build = |value: &[u8]| [preface(), frame(HEADERS, 4, &request(value, true))].concat();
        let mended = through(&build(&coded("010101", "1011100")), 3).await;
        // The first of seven bits that is plain is 'B', 1011101.
        let wanted = coded("010110", "1011101");
        assert_eq!(mended, build(&wanted));
    }

    #[test]
    fn the_code_is_the_rfcs() {
        // One code of each length, as appendix B has it.
        for (character, code, bits) in [
            (b't', 0x9, 5),
            (b'u', 0x2d, 6),
            (b'z', 0x7b, 7),
            (b'Z', 0xfd, 8),
            (b'?', 0x3fc, 10),
            (b'|', 0x7fc, 11),
            (b'>', 0xffb, 12),
            (b'~', 0x1ffd, 13),
            (b'}', 0x3ffd, 14),
            (b'{', 0x7ffe, 15),
        ] {
            let (mut first, mut shorter) = (0, 0);
            for (length, characters) in CODES {
                first <<= length - shorter;
                shorter = length;
                if length == bits {
                    assert_eq!(characters[code - first], character);
                }
                first += characters.len();
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_request_comes_through_as_it_is() {
        let whole = [preface(), frame(HEADERS, 4, &request(b"a%b", false))].concat();
        for sent in [
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            (0..=255u8).cycle().take(10_000).collect(),
            [preface(), vec![0xff; 500]].concat(),
            // Cut off, and lengths that lead out of the frame.
            whole[..whole.len() - 3].to_vec(),
            [preface(), frame(HEADERS, 4, b"\x01\x7f\xff\xff\xff\xff\xff")].concat(),
            [preface(), frame(HEADERS, 4, b"\x01\x20%")].concat(),
            [preface(), frame(HEADERS, PADDED | PRIORITY, b"\xff%")].concat(),
            [preface(), frame(HEADERS, 4, b"")].concat(),
            vec![],
        ] {
            for size in [1, 1 << 16] {
                assert_eq!(through(&sent, size).await, sent);
            }
        }
    }
}
