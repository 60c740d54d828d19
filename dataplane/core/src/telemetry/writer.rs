//! Log lines leave through one thread and a bounded queue: a slow reader of our output costs lines,
//! never the time of a connection.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

/// facts ztunnel 12.5
const QUEUE_LINES: usize = 10_000;
/// Lines written by one call.
const BATCH_LINES: usize = 64;
/// After a call, for more lines to gather: to wake the thread for each would cost a busy worker more
/// than the line itself. A line after a quiet time is written at once.
const PAUSE: Duration = Duration::from_millis(5);
/// Between two lines that tell of lost ones.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct LineWriter {
    queue: Sender<Item>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting: AtomicUsize,
    /// Lines that may wait.
    limit: AtomicUsize,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Item {
    Line(String),
    /// Answered when everything before it was written.
    Flush(SyncSender<()>),
}

/// Tells once in a while how many lines were lost since it last did.
struct Losses {
    told: u64,
    last: Option<Instant>,
    line: fn(u64) -> String,
}

impl LineWriter {
    /// `dropped` counts lines lost; `lost` makes the line that tells of so many.
    pub fn new(
        output: Box<dyn Write + Send>,
        dropped: Arc<AtomicU64>,
        lost: fn(u64) -> String,
    ) -> std::io::Result<Self> {
        // Bounded by `limit`, which may change, unlike the bound of a channel.
        let (queue, items) = channel();
        let shared = Arc::new(Shared {
            waiting: AtomicUsize::new(0),
            limit: AtomicUsize::new(QUEUE_LINES),
            dropped,
        });
        let ours = shared.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(output, &items, &ours, lost))?;
        Ok(Self { queue, shared })
    }

    /// 0 takes the default.
    pub fn set_limit(&self, lines: u32) {
        let lines = if lines == 0 {
            QUEUE_LINES
        } else {
            lines as usize
        };
        self.shared.limit.store(lines, Relaxed);
    }

    /// Never blocks.
    pub fn line(&self, line: String) {
        let Shared {
            waiting,
            limit,
            dropped,
        } = &*self.shared;
        let full = waiting.fetch_add(1, Relaxed) >= limit.load(Relaxed);
        if full || self.queue.send(Item::Line(line)).is_err() {
            waiting.fetch_sub(1, Relaxed);
            dropped.fetch_add(1, Relaxed);
        }
    }

    /// Waits until the lines so far are out, for the end of the process. May block: not for tasks.
    pub fn flush(&self, patience: Duration) {
        let (done, wait) = sync_channel(1);
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(patience);
        }
    }
}

fn write_all(
    mut output: Box<dyn Write + Send>,
    items: &Receiver<Item>,
    shared: &Shared,
    lost: fn(u64) -> String,
) {
    let mut batch = Vec::new();
    let mut losses = Losses {
        told: 0,
        last: None,
        line: lost,
    };
    loop {
        let dropped = shared.dropped.load(Relaxed);
        let first = match losses.wait(dropped) {
            None => items.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(wait) => items.recv_timeout(wait),
        };
        let mut lines = 0;
        let mut flushes = Vec::new();
        let first = match first {
            Ok(first) => Some(first),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        for item in first
            .into_iter()
            .chain(items.try_iter().take(BATCH_LINES - 1))
        {
            match item {
                Item::Line(line) => {
                    lines += 1;
                    batch.extend_from_slice(line.as_bytes());
                }
                Item::Flush(done) => flushes.push(done),
            }
        }
        losses.tell(shared.dropped.load(Relaxed), &mut batch);
        // Nobody is left to tell that the output is gone.
        let _ = output.write_all(&batch).and_then(|()| output.flush());
        batch.clear();
        // They wait until they are out: what one call writes counts too.
        shared.waiting.fetch_sub(lines, Relaxed);
        if flushes.is_empty() && lines < BATCH_LINES {
            std::thread::sleep(PAUSE);
        }
        for done in flushes {
            let _ = done.try_send(());
        }
    }
}

impl Losses {
    /// How long until they may be told; None when there are none.
    fn wait(&self, dropped: u64) -> Option<Duration> {
        let left = |last: Instant| TELL_AGAIN.saturating_sub(last.elapsed());
        (dropped > self.told).then(|| self.last.map_or(Duration::ZERO, left))
    }

    fn tell(&mut self, dropped: u64, batch: &mut Vec<u8>) {
        if self.wait(dropped) == Some(Duration::ZERO) {
            batch.extend_from_slice((self.line)(dropped - self.told).as_bytes());
            self.told = dropped;
            self.last = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn lost(lines: u64) -> String {
        format!("{lines} lost\n")
    }

    /// A pipe that nobody reads is full after 64 KiB: the writer's thread blocks in the kernel.
    #[test]
    fn a_full_pipe_costs_lines_not_time_and_the_loss_is_told() {
        let (mut reader, output) = std::io::pipe().unwrap();
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = LineWriter::new(Box::new(output), dropped.clone(), lost).unwrap();
        writer.set_limit(100);
        let line = format!("{}\n", "x".repeat(999));
        let begin = Instant::now();
        for _ in 0..1000 {
            writer.line(line.clone());
        }
        assert!(begin.elapsed() < Duration::from_secs(1));
        // The pipe's 64 KiB and the queue's hundred, which may have been filled more than once
        // before the pipe was full.
        let count = dropped.load(Relaxed);
        assert!((1000 - 64 - 200..=900).contains(&count), "{count}");

        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let written = text.lines().filter(|line| line.starts_with('x')).count();
        assert_eq!(written as u64 + count, 1000, "no line is lost uncounted");
        let told = text.lines().filter_map(|line| line.strip_suffix(" lost"));
        let told: u64 = told.map(|count| count.parse::<u64>().unwrap()).sum();
        assert!((1..=count).contains(&told), "{told} of {count}");
    }

    #[test]
    fn a_shorter_queue_counts_from_the_next_line_on() {
        let (reader, output) = std::io::pipe().unwrap();
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = LineWriter::new(Box::new(output), dropped.clone(), lost).unwrap();
        writer.line("x".repeat(1 << 20));
        for _ in 0..20 {
            writer.line("queued\n".into());
        }
        assert_eq!(dropped.load(Relaxed), 0);
        writer.set_limit(10);
        writer.line("one too many\n".into());
        assert_eq!(dropped.load(Relaxed), 1);
        drop(reader);
    }

    #[test]
    fn flush_returns_when_lines_are_out() {
        let (mut reader, output) = std::io::pipe().unwrap();
        let writer = LineWriter::new(Box::new(output), Arc::default(), lost).unwrap();
        writer.line("one\n".into());
        writer.line("two\n".into());
        writer.flush(Duration::from_secs(10));
        let mut all = [0; 8];
        reader.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"one\ntwo\n");
    }
}
