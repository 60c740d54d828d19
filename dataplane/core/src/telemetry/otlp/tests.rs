use super::*;
use crate::telemetry::access::{Access, Bytes as Relayed};
use crate::telemetry::labels::{Flags, Labels, Reporter, Side};
use crate::telemetry::settings::Settings;
use crate::wire::control;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use tokio::net::TcpListener;

const IDS: SpanIds = SpanIds {
    trace: 7,
    span: 8,
    parent: 9,
};

fn record(error: Option<&str>) -> Record {
    let labels = Labels {
        reporter: Reporter::Destination,
        source: Side::default(),
        destination: Side::default(),
        service: None,
        mtls: true,
    };
    let access = Access {
        direction: "inbound",
        trace: &"",
        src_addr: "10.0.0.1:4000".parse().unwrap(),
        src_workload: "web",
        dst_addr: "10.0.0.2:15008".parse().unwrap(),
        hbone_addr: None,
        dst_workload: "db",
        labels: &labels,
        policy: None,
    };
    let end = End {
        bytes: Relayed {
            from_client: 3,
            from_server: 5,
        },
        duration: Duration::from_millis(20),
        flags: Flags::None,
        error,
    };
    let log = control::LogConfig {
        omit_fields: vec!["src.workload".into()],
        ..Default::default()
    };
    Record::complete(IDS, &access, &end, &Settings::new(&log).omitted())
}

/// Answers as `answer` says, by the number of the call; returns how many were asked.
async fn collector(
    answer: impl Fn(usize) -> (&'static str, &'static [u8]) + Send + 'static,
) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = calls.clone();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(mut connection) = h2::server::handshake(tcp).await else {
                continue;
            };
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let (status, body) = answer(seen.fetch_add(1, SeqCst));
                let head = http::Response::new(());
                let mut stream = respond.send_response(head, false).unwrap();
                let _ = stream.send_data(bytes::Bytes::from_static(body), false);
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", status.parse().unwrap());
                let _ = stream.send_trailers(trailers);
            }
        }
    });
    (authority, calls)
}

fn counted(counters: &BySignal, signal: &'static str) -> u64 {
    counters.get_or_create(&[("signal", signal)]).get()
}

#[test]
fn a_span_continues_the_peers_and_omits_what_the_log_omits() {
    let Record { span, log } = record(Some("broken"));
    let span = span.unwrap();
    assert_eq!(span.trace_id, 7_u128.to_be_bytes().as_slice());
    assert_eq!(span.span_id, 8_u64.to_be_bytes().as_slice());
    assert_eq!(span.parent_span_id, 9_u64.to_be_bytes().as_slice());
    assert_eq!(span.kind(), pb::span::Kind::Server);
    let status = span.status.unwrap();
    assert_eq!(status.code(), pb::status::Code::Error);
    assert_eq!(status.message, "broken");
    assert_eq!(
        span.end_time_unix_nano - span.start_time_unix_nano,
        20_000_000
    );
    assert_eq!((log.trace_id, log.span_id), (span.trace_id, span.span_id));
    assert_eq!(
        (log.severity_number, log.attributes.clone()),
        (17, span.attributes)
    );
    let keys: Vec<_> = log
        .attributes
        .iter()
        .map(|pair| pair.key.as_str())
        .collect();
    assert!(
        keys.contains(&"dst.workload") && !keys.contains(&"src.workload"),
        "{keys:?}"
    );
    let value = |key: &str| {
        let pair = log.attributes.iter().find(|pair| pair.key == key).unwrap();
        pair.value.clone().unwrap().value.unwrap()
    };
    assert_eq!(value("bytes_sent"), pb::any_value::Value::IntValue(5));
}

#[tokio::test]
async fn a_collector_that_is_away_costs_no_time_and_the_queues_surplus() {
    let counters = Counters::default();
    // Nobody listens on it.
    let exporter = Exporter::start("127.0.0.1:1", "n1", counters.clone());
    let begin = std::time::Instant::now();
    for _ in 0..3 * QUEUE {
        exporter.export(record(None));
    }
    assert!(begin.elapsed() < Duration::from_secs(2));
    for signal in ["logs", "traces"] {
        let dropped = counted(&counters.dropped, signal);
        assert!(
            (QUEUE as u64..=2 * QUEUE as u64).contains(&dropped),
            "{dropped}"
        );
    }
}

#[tokio::test]
async fn what_may_pass_is_tried_again_and_a_refusal_is_counted() {
    for (status, tries, taken) in [("14", 4, 1), ("3", 2, 0)] {
        // The first answer for each signal, then success.
        let (authority, calls) = collector(move |call| match (status, call) {
            ("14", 0 | 2) | ("3", _) => (status, b"\0\0\0\0\0"),
            _ => ("0", b"\0\0\0\0\0"),
        })
        .await;
        let counters = Counters::default();
        let exporter = Exporter::start(&authority, "n1", counters.clone());
        exporter.export(record(None));
        exporter.flush(Duration::from_secs(20)).await;
        assert_eq!(calls.load(SeqCst), tries, "{status}");
        for signal in ["logs", "traces"] {
            assert_eq!(counted(&counters.exported, signal), taken, "{status}");
            assert_eq!(counted(&counters.dropped, signal), 1 - taken, "{status}");
        }
    }
}

#[tokio::test]
async fn what_the_collector_rejects_in_part_is_counted_as_lost() {
    // ExportReply { partial_success { rejected: 1 } }
    let (authority, _calls) = collector(|_| ("0", b"\0\0\0\0\x04\x0a\x02\x08\x01")).await;
    let counters = Counters::default();
    let exporter = Exporter::start(&authority, "n1", counters.clone());
    for _ in 0..3 {
        exporter.export(record(None));
    }
    exporter.flush(Duration::from_secs(20)).await;
    assert_eq!(counted(&counters.exported, "logs"), 2);
    assert_eq!(counted(&counters.dropped, "logs"), 1);
}
