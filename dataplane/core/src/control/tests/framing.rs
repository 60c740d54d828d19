use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;

use super::*;

fn pair() -> (StdStream, UnixStream) {
    let (ours, theirs) = StdStream::pair().expect("sockets");
    theirs.set_nonblocking(true).expect("a socket");
    (ours, UnixStream::from_std(theirs).expect("a runtime"))
}

fn bytes(request: &pb::Request) -> Vec<u8> {
    let body = request.encode_to_vec();
    let mut all = (body.len() as u32).to_be_bytes().to_vec();
    all.extend(body);
    all
}

fn request(id: u64) -> pb::Request {
    pb::Request {
        id,
        fds: 0,
        body: Some(Ask::ListPods(pb::ListPods {})),
    }
}

fn open() -> OwnedFd {
    std::fs::File::open("/proc/version").expect("exists").into()
}

#[tokio::test]
async fn a_frame_may_come_byte_by_byte() {
    let (mut ours, theirs) = pair();
    let all = bytes(&request(7));
    let writer = std::thread::spawn(move || {
        for byte in all {
            ours.write_all(&[byte]).expect("they read");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let frame = frame::read(&theirs).await.unwrap().expect("a frame");
    assert_eq!(pb::Request::decode(frame.body).unwrap().id, 7);
    writer.join().unwrap();
    assert!(frame::read(&theirs).await.unwrap().is_none());
}

#[tokio::test]
async fn frames_in_one_write_are_told_apart() {
    let (mut ours, theirs) = pair();
    let both = [bytes(&request(1)), bytes(&request(2))].concat();
    ours.write_all(&both).unwrap();
    for id in [1, 2] {
        let frame = frame::read(&theirs).await.unwrap().expect("a frame");
        assert_eq!(pb::Request::decode(frame.body).unwrap().id, id);
    }
}

#[tokio::test]
async fn an_end_inside_a_frame_is_an_error() {
    let all = bytes(&request(7));
    for kept in [1, 4, all.len() - 1] {
        let (mut ours, theirs) = pair();
        ours.write_all(&all[..kept]).unwrap();
        drop(ours);
        let error = frame::read(&theirs).await.expect_err("truncated");
        assert!(matches!(error, frame::FrameError::Truncated), "{kept}");
    }
}

#[tokio::test]
async fn a_frame_over_the_limit_is_an_error_before_its_body() {
    let (mut ours, theirs) = pair();
    let length = u32::try_from(frame::MAX_FRAME + 1).unwrap();
    ours.write_all(&length.to_be_bytes()).unwrap();
    let error = frame::read(&theirs).await.expect_err("too long");
    assert!(matches!(error, frame::FrameError::TooLong(_)));
}

#[tokio::test]
async fn descriptors_stay_with_their_frame() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let (a, b) = (open(), open());
    frame::write(&ours, &request(1), &[]).await.unwrap();
    frame::write(&ours, &request(2), &[a, b]).await.unwrap();
    frame::write(&ours, &request(3), &[open()]).await.unwrap();
    frame::write(&ours, &request(4), &[]).await.unwrap();
    for expected in [0, 2, 1, 0] {
        let frame = frame::read(&theirs).await.unwrap().expect("a frame");
        assert_eq!(frame.fds.len(), expected);
        for fd in frame.fds {
            let flags = rustix::io::fcntl_getfd(&fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
}

#[tokio::test]
async fn a_large_frame_crosses_with_its_descriptor() {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let response = vec![7; 5 << 20];
    let large = pb::Request {
        id: 1,
        fds: 1,
        body: Some(Ask::Apply(pb::Apply {
            response: response.into(),
        })),
    };
    let fds = [open()];
    let (sent, got) = tokio::join!(frame::write(&ours, &large, &fds), frame::read(&theirs));
    sent.unwrap();
    let frame = got.unwrap().expect("a frame");
    assert_eq!(frame.fds.len(), 1);
    assert_eq!(pb::Request::decode(frame.body).unwrap(), large);
}
