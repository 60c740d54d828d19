//! A data plane that finds maps of another layout pinned, under programs that go on capturing.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData};
use tokio::io::AsyncWriteExt;

use super::super::CaptureError;
use super::super::sys::maps::{Layout, PinnedMap};
use super::{Kernel, Node, accepted, client, output, pod};
use crate::inpod::original_dst;

/// Dials again and again until its input ends.
const LOAD: &str = "import select, socket, sys\n\
    done = failed = 0\n\
    while not select.select([sys.stdin], [], [], 0)[0]:\n\
    \x20   try:\n\
    \x20       s = socket.create_connection(('192.0.2.7', 80), 10)\n\
    \x20       ok = s.getpeername() == ('192.0.2.7', 80) and s.recv(100) == b'hello'\n\
    \x20       s.close()\n\
    \x20   except OSError as error:\n\
    \x20       print(error, file=sys.stderr)\n\
    \x20       ok = False\n\
    \x20   done, failed = done + ok, failed + (not ok)\n\
    print(done > 0, failed)\n";

fn layout(node: &Node, map: &str) -> Layout {
    PinnedMap::open(&pinned(node, map)).unwrap().layout
}

fn pinned(node: &Node, map: &str) -> PathBuf {
    node.capture.folder.join("maps").join(map)
}

/// Another version's map in the place of ours, with as much of the entries as fits.
fn lay_out(node: &Node, map: &str, change: fn(&mut Layout)) {
    let path = pinned(node, map);
    let now = PinnedMap::open(&path).unwrap();
    let mut layout = now.layout;
    change(&mut layout);
    let other = PinnedMap::make(layout).unwrap();
    let _ = now.carry_to(&other);
    std::fs::remove_file(&path).unwrap();
    other.pin(&path).unwrap();
}

fn records(node: &Node) -> Array<MapData, u32> {
    let map = MapData::from_pin(pinned(node, "records")).unwrap();
    Array::try_from(Map::Array(map)).unwrap()
}

/// As the next process does, which knows only what is pinned.
fn reopen(node: &mut Node) -> Result<(), CaptureError> {
    node.kernel = None;
    let mut kernel = Kernel::open(node.capture.clone())?;
    let listener = node.redirected().inbound_plaintext.as_fd();
    let adopted = kernel.adopt(&node.netns, &pod(), listener)?;
    assert!(adopted.is_some(), "the pod isn't known any more");
    node.kernel = Some(kernel);
    Ok(())
}

/// What the pod dials arrives, and nothing of the renewal is left.
async fn captures(node: &mut Node) {
    let child = node.run(&client("192.0.2.7:80"));
    let (mut stream, _) = accepted(&node.redirected().outbound).await;
    assert_eq!(
        original_dst(&stream).unwrap(),
        "192.0.2.7:80".parse().unwrap()
    );
    stream.write_all(b"hello").await.unwrap();
    drop(stream);
    assert!(output(child).ends_with("hello\n"));
    assert_eq!(folders(node), ["links", "maps", "pods"]);
}

fn folders(node: &Node) -> Vec<String> {
    let entries = std::fs::read_dir(&node.capture.folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pods_of_another_layout_are_carried_over_and_no_connection_is_lost() {
    let mut node = Node::new();
    node.enrol();
    let present = layout(&node, "pods");
    lay_out(&node, "pods", |pods| pods.value_size -= 8);
    let outbound = node.redirected().outbound.as_fd().try_clone_to_owned();
    let outbound = std::net::TcpListener::from(outbound.unwrap());
    let mut load = node.run(LOAD);
    let (greeted, mut greetings) = tokio::sync::mpsc::unbounded_channel();
    let server = tokio::spawn(async move {
        let outbound = tokio::net::TcpListener::from_std(outbound).unwrap();
        loop {
            let (mut stream, _) = outbound.accept().await.unwrap();
            let dialled = original_dst(&stream);
            assert_eq!(dialled.unwrap(), "192.0.2.7:80".parse().unwrap());
            let _ = stream.write_all(b"hello").await;
            let _ = greeted.send(());
        }
    });
    for _ in 0..10 {
        greetings.recv().await.unwrap();
    }
    reopen(&mut node).unwrap_or_else(|error| panic!("{error}"));
    while greetings.try_recv().is_ok() {}
    for _ in 0..10 {
        greetings.recv().await.unwrap();
    }
    load.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(output(load), "True 0\n");
    server.abort();
    let _ = server.await;
    assert_eq!(layout(&node, "pods"), present);
    assert_eq!(folders(&node), ["links", "maps", "pods"]);
    let kernel = node.kernel.as_mut().unwrap();
    // The last bytes of its address weren't known, which adding the pod again puts right.
    let problems = kernel.verify(&node.netns, &pod(), true).unwrap();
    let incomplete = "its settings or addresses aren't those in the map";
    assert_eq!(problems, [incomplete]);
    node.enrol();
    let kernel = node.kernel.as_mut().unwrap();
    assert!(kernel.verify(&node.netns, &pod(), true).unwrap().is_empty());
}

#[tokio::test]
async fn counters_and_addresses_outlive_smaller_maps() {
    let mut node = Node::new();
    node.enrol();
    captures(&mut node).await;
    let present = ["reasons", "own_addresses"].map(|map| layout(&node, map));
    lay_out(&node, "reasons", |reasons| reasons.max_entries -= 2);
    lay_out(&node, "own_addresses", |own| own.max_entries /= 2);
    reopen(&mut node).unwrap();
    assert_eq!(
        ["reasons", "own_addresses"].map(|map| layout(&node, map)),
        present
    );
    captures(&mut node).await;
    assert_eq!(node.count("captured"), 2);
    let kernel = node.kernel.as_mut().unwrap();
    assert!(kernel.verify(&node.netns, &pod(), true).unwrap().is_empty());
}

#[tokio::test]
async fn records_of_connections_and_their_numbers_begin_anew_together() {
    let mut node = Node::new();
    node.enrol();
    lay_out(&node, "originals", |originals| originals.max_entries /= 2);
    // As many as the pod may have: with entries that nobody knows of it would be refused for good.
    records(&node).set(0, 100, 0).unwrap();
    reopen(&mut node).unwrap();
    assert_eq!(records(&node).get(&0, 0).unwrap(), 0);
    captures(&mut node).await;
}

#[tokio::test]
async fn maps_that_fit_are_kept_as_they_are() {
    let mut node = Node::new();
    node.enrol();
    // In a place that no pod has.
    records(&node).set(7, 3, 0).unwrap();
    reopen(&mut node).unwrap();
    assert_eq!(records(&node).get(&7, 0).unwrap(), 3);
    // Nor is it made anew with another.
    lay_out(&node, "reasons", |reasons| reasons.max_entries -= 1);
    reopen(&mut node).unwrap();
    assert_eq!(records(&node).get(&7, 0).unwrap(), 3);
    captures(&mut node).await;
}

#[tokio::test]
async fn what_a_crash_left_of_a_renewal_is_done_over() {
    let mut node = Node::new();
    node.enrol();
    let present = layout(&node, "pods");
    lay_out(&node, "pods", |pods| pods.value_size += 16);
    // Before the swap: some of the maps beside, without entries.
    let beside = node.capture.folder.join("maps-new");
    std::fs::create_dir(&beside).unwrap();
    for map in ["pods", "exempt"] {
        let empty = PinnedMap::make(layout(&node, map)).unwrap();
        empty.pin(&beside.join(map)).unwrap();
    }
    reopen(&mut node).unwrap();
    captures(&mut node).await;
    assert_eq!(layout(&node, "pods"), present);
    // After it: the older ones beside.
    std::fs::create_dir(&beside).unwrap();
    let mut older = present;
    older.value_size += 16;
    PinnedMap::make(older)
        .unwrap()
        .pin(&beside.join("pods"))
        .unwrap();
    reopen(&mut node).unwrap();
    captures(&mut node).await;
    assert_eq!(layout(&node, "pods"), present);
}

#[tokio::test]
async fn pods_that_cannot_be_carried_over_stay_captured_by_the_old_programs() {
    let mut node = Node::new();
    node.enrol();
    lay_out(&node, "pods", |pods| pods.key_size = 16);
    let error = reopen(&mut node).unwrap_err().to_string();
    assert!(error.contains("can't be brought along"), "{error}");
    let child = node.run(&client("192.0.2.7:80"));
    let (stream, _) = accepted(&node.redirected().outbound).await;
    assert_eq!(
        original_dst(&stream).unwrap(),
        "192.0.2.7:80".parse().unwrap()
    );
    drop(stream);
    output(child);
}
