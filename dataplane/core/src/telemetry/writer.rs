//! Log lines leave through one thread and a bounded queue: a slow reader of our output costs lines,
//! never the time of a connection.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// facts ztunnel 12.5
const QUEUE_LINES: usize = 10_000;
/// Lines written by one call.
const BATCH_LINES: usize = 64;
/// After a call, for more lines to gather: to wake the thread for each would cost a busy worker more
/// than the line itself. A line after a quiet time is written at once.
const PAUSE: Duration = Duration::from_millis(5);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct LineWriter {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Item {
    Line(String),
    /// Answered when everything before it was written.
    Flush(SyncSender<()>),
}

impl LineWriter {
    /// `dropped` counts lines lost.
    pub fn new(output: Box<dyn Write + Send>, dropped: Arc<AtomicU64>) -> std::io::Result<Self> {
        Self::with_capacity(output, dropped, QUEUE_LINES)
    }

    fn with_capacity(
        output: Box<dyn Write + Send>,
        dropped: Arc<AtomicU64>,
        lines: usize,
    ) -> std::io::Result<Self> {
        let (queue, items) = sync_channel(lines);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(output, &items))?;
        Ok(Self { queue, dropped })
    }

    /// Never blocks.
    pub fn line(&self, line: String) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.queue.try_send(Item::Line(line))
        {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Waits until the lines so far are out, for the end of the process. May block: not for tasks.
    pub fn flush(&self, patience: Duration) {
        let (done, wait) = sync_channel(1);
        // A full queue at the end of the process: its lines are being written, give them the time.
        let deadline = std::time::Instant::now() + patience;
        let mut item = Item::Flush(done);
        while let Err(TrySendError::Full(back)) = self.queue.try_send(item) {
            if std::time::Instant::now() >= deadline {
                return;
            }
            item = back;
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = wait.recv_timeout(patience);
    }
}

fn write_all(mut output: Box<dyn Write + Send>, items: &Receiver<Item>) {
    let mut batch = Vec::new();
    while let Ok(first) = items.recv() {
        let mut waiting = None;
        let mut lines = 0;
        for item in std::iter::once(first).chain(items.try_iter().take(BATCH_LINES - 1)) {
            match item {
                Item::Line(line) => {
                    lines += 1;
                    batch.extend_from_slice(line.as_bytes());
                }
                Item::Flush(done) => waiting = Some(done),
            }
        }
        // Nobody is left to tell that the output is gone.
        let _ = output.write_all(&batch).and_then(|()| output.flush());
        batch.clear();
        if let Some(done) = waiting {
            let _ = done.try_send(());
        } else if lines < BATCH_LINES {
            std::thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    /// Blocks in write until the test lets it go.
    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.recv();
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_costs_lines_not_time() {
        let (release, stuck) = channel();
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = LineWriter::with_capacity(Box::new(Stuck(stuck)), dropped.clone(), 2).unwrap();
        for n in 0..100 {
            writer.line(format!("{n}\n"));
        }
        // Two are queued, and at most a batch is in the stuck call.
        let lost = dropped.load(Relaxed);
        assert!((30..=98).contains(&lost), "{lost}");
        drop(release);
    }

    #[test]
    fn flush_returns_when_lines_are_out() {
        let (lines, seen) = channel();
        struct Tell(std::sync::mpsc::Sender<Vec<u8>>);
        impl Write for Tell {
            fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.send(buf.to_vec());
                Ok(buf.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let writer = LineWriter::new(Box::new(Tell(lines)), Arc::default()).unwrap();
        writer.line("one\n".into());
        writer.line("two\n".into());
        writer.flush(Duration::from_secs(10));
        let all: Vec<u8> = seen.try_iter().flatten().collect();
        assert_eq!(String::from_utf8(all).unwrap(), "one\ntwo\n");
    }
}
