//! A serial log read while the guest writes it.
//!
//! The guest decides what is in it, so nothing is assumed: no text encoding, no line ends, no
//! length. One window is kept in memory whatever the guest writes.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// How much is kept of what was read last, in bytes: more than the longest text looked for and a
/// line around it.
const KEPT_BYTES: usize = 4 << 10;

/// How much is read at once, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// The longest line that is given back, in bytes.
const LINE_BYTES_MAX: usize = 512;

/// A place in a serial log, and what came just before it.
#[derive(Debug)]
pub struct SerialTail {
    path: PathBuf,
    offset: u64,
    window: Vec<u8>,
}

impl SerialTail {
    /// The beginning of the log at this path, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, window: Vec::new() }
    }

    /// The log.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads on to the end of the log, or to the first of these texts in it; gives the number that
    /// came with the text, and the line it stands in.
    ///
    /// # Errors
    /// Those of reading; a log that is not there is an empty one.
    pub fn find(&mut self, texts: &[(usize, &str)]) -> io::Result<Option<(usize, String)>> {
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        loop {
            // Before reading, so that a second call finds the next text in the same window.
            if let Some(found) = self.find_in_window(texts) {
                return Ok(Some(found));
            }
            let surplus = self.window.len().saturating_sub(KEPT_BYTES);
            self.window.drain(..surplus);
            self.skip_hole(&file);
            file.seek(SeekFrom::Start(self.offset))?;
            let mut piece = (&mut file).take(PIECE_BYTES as u64);
            let count = piece.read_to_end(&mut self.window)?;
            if count == 0 {
                return Ok(None);
            }
            self.offset += count as u64;
        }
    }

    /// Goes on behind what [`Machine::trim_serial_log`](super::Machine::trim_serial_log) gave back:
    /// it reads as zeros, and there may be very much of it.
    fn skip_hole(&mut self, file: &File) {
        // An error means that there is no data to come, or that the file system cannot tell.
        if let Ok(data) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(self.offset))
            && data > self.offset
        {
            self.offset = data;
            // Nothing runs across the gap.
            self.window.push(b'\n');
        }
    }

    /// The last line that is not empty, without control characters.
    #[must_use]
    pub fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.window);
        let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        printable(line.as_bytes())
    }

    /// The earliest text in the window; the window then begins behind it.
    fn find_in_window(&mut self, texts: &[(usize, &str)]) -> Option<(usize, String)> {
        let found = texts.iter().filter_map(|(number, text)| {
            let at = position(&self.window, text.as_bytes())?;
            Some((at, at + text.len(), *number))
        });
        let (at, end, number) = found.min()?;
        let is_end = |byte: &u8| *byte == b'\n' || *byte == b'\r';
        let before = self.window.get(..at)?;
        let line_start = before.iter().rposition(is_end).map_or(0, |place| place + 1);
        let after = self.window.get(end..)?;
        let line_end = end + after.iter().position(is_end).unwrap_or(after.len());
        let line = printable(self.window.get(line_start..line_end)?);
        self.window.drain(..end);
        Some((number, line))
    }
}

fn position(bytes: &[u8], text: &[u8]) -> Option<usize> {
    if text.is_empty() {
        return None;
    }
    bytes.windows(text.len()).position(|place| place == text)
}

fn printable(line: &[u8]) -> String {
    let line = line.get(..LINE_BYTES_MAX).unwrap_or(line);
    let text = String::from_utf8_lossy(line);
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    struct Log(tempfile::NamedTempFile);

    impl Log {
        fn new() -> Self {
            Self(tempfile::NamedTempFile::new().unwrap())
        }

        fn write(&mut self, bytes: &[u8]) {
            self.0.write_all(bytes).unwrap();
        }

        fn tail(&self) -> SerialTail {
            SerialTail::new(self.0.path().to_owned())
        }
    }

    #[test]
    fn a_text_is_found_as_it_is_written() {
        let mut log = Log::new();
        let mut tail = log.tail();
        assert_eq!(tail.find(&[(7, "login:")]).unwrap(), None);
        log.write(b"booting\r\ndemo log");
        assert_eq!(tail.find(&[(7, "login:")]).unwrap(), None);
        assert_eq!(tail.last_line(), "demo log");
        log.write(b"in: \r\nmore");
        assert_eq!(tail.find(&[(7, "login:")]).unwrap(), Some((7, "demo login: ".to_owned())));
        assert_eq!(tail.find(&[(7, "login:")]).unwrap(), None, "each once");
    }

    #[test]
    fn the_earliest_of_several_texts_is_found_and_then_the_next() {
        let mut log = Log::new();
        log.write(b"panic\nlogin:\npanic\n");
        let mut tail = log.tail();
        let texts = [(0, "login:"), (1, "panic")];
        let numbers: Vec<_> =
            std::iter::from_fn(|| tail.find(&texts).unwrap()).map(|(number, _)| number).collect();
        assert_eq!(numbers, [1, 0, 1]);
    }

    #[test]
    fn no_log_yet_is_an_empty_log() {
        let mut tail = SerialTail::new("/nonexistent/serial.log".into());
        assert_eq!(tail.find(&[(0, "x")]).unwrap(), None);
        assert_eq!(tail.last_line(), "");
    }

    #[test]
    fn memory_stays_bounded_and_lines_short() {
        let mut log = Log::new();
        log.write(&vec![b'a'; 10 << 20]);
        let mut tail = log.tail();
        assert_eq!(tail.find(&[(0, "b")]).unwrap(), None);
        assert!(tail.window.capacity() <= 4 * PIECE_BYTES, "{}", tail.window.capacity());
        log.write(b"b");
        let (_, line) = tail.find(&[(0, "b")]).unwrap().unwrap();
        assert!(line.len() <= LINE_BYTES_MAX);
    }

    #[test]
    fn what_was_trimmed_away_is_skipped() {
        let mut log = Log::new();
        log.write(b"old log");
        let mut tail = log.tail();
        assert_eq!(tail.find(&[(0, "login:")]).unwrap(), None);
        // So large that reading it all would not end.
        let far = 1 << 42;
        log.0.as_file_mut().seek(SeekFrom::Start(far)).unwrap();
        log.write(b"in: new login:");
        let (_, line) = tail.find(&[(0, "login:")]).unwrap().unwrap();
        assert_eq!(line.trim_start_matches('\0'), "in: new login:");
        let (_, line) = log.tail().find(&[(0, "new")]).unwrap().unwrap();
        assert_eq!(line, "in: new login:");
    }

    #[test]
    fn control_characters_do_not_reach_the_operator() {
        let mut log = Log::new();
        log.write(b"\x1b[2J\x07login: \xff\xfe\n");
        let (_, line) = log.tail().find(&[(0, "login:")]).unwrap().unwrap();
        assert_eq!(line, "[2Jlogin: \u{fffd}\u{fffd}");
    }

    proptest! {
        /// However the guest's bytes arrive, the text is found exactly as often as it is there.
        #[test]
        fn texts_across_any_cuts_are_found(
            bytes in prop::collection::vec(prop::sample::select(b"ab\n".to_vec()), 0..400),
            cuts in prop::collection::vec(0_usize..400, 0..8),
        ) {
            let text = "aba";
            let mut expected = 0;
            let mut rest = &bytes[..];
            while let Some(at) = position(rest, text.as_bytes()) {
                expected += 1;
                rest = &rest[at + text.len()..];
            }
            let mut log = Log::new();
            let mut tail = log.tail();
            let (mut found, mut written) = (0, 0);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            for cut in cuts {
                log.write(&bytes[written..cut]);
                written = cut;
                while tail.find(&[(0, text)]).unwrap().is_some() {
                    found += 1;
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
