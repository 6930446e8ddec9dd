// The schedule: pairs are divided into groups whose activations fit the cache, groups are processed in phases of
// independent tasks. The arithmetic is in the kernels. See docs/kernels.md, "Threads".
#include <algorithm>
#include <stdexcept>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "model.h"

namespace turborank {
namespace {

constexpr int kGroupTokens = 512;   // tokens of a group that one thread takes through all layers
constexpr int kAloneTokens = 512;   // tokens of a pair up to which it may be in such a group
constexpr int kLikeLength = 64;     // pairs have similar length if they differ by at most 1/64 of it
constexpr int kQueriesPerTask = 2048;
constexpr int kFewestRows = 8;        // minimum of tokens for each thread; fewer do not pay for waking it

// While the kernels run, denormals count as zero and rounding is to nearest. The caller's mode is restored afterwards.
struct FloatMode {
#if defined(__SSE__)
    const unsigned saved = _mm_getcsr();
    FloatMode() { _mm_setcsr(0x9fc0); }
    ~FloatMode() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
    FloatMode() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        set(uint64_t{1} << 24);  // FZ; rounding to nearest is 0
    }
    ~FloatMode() { set(saved); }
    static void set(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    ~FloatMode() {}
#endif
};

}  // namespace

void Scratch::reserve(const Shape& s, int block_rows, int longest) {
    const size_t rows = static_cast<size_t>(block_rows + kSlackRows), D = static_cast<size_t>(s.D);
    const size_t depth = static_cast<size_t>(round_up(std::max(s.C, s.F), 64)), keys = static_cast<size_t>(round_up(longest, kTile));
    operand.reserve(rows * depth * 4);
    row_scale.reserve(2 * rows * 4);
    mixed.reserve(depth * 4);
    normed.reserve(depth * 4);
    key_norms.reserve(keys / kTile * 4);
    if (s.cosine) low.reserve(rows * kPanel * 4), starts.reserve(rows * sizeof(float*));
    hidden.reserve(rows * static_cast<size_t>(std::max(s.F, 2 * s.C)) * 4);
    tiles.reserve(2 * kTile * kPanel * 4);
    queries.reserve(kTile * D * 4);
    values.reserve(keys * D * 4);
    bias.reserve((2 * keys + 4 * kTile) * 4);
    probabilities.reserve(kTile * kKeyChunk * 4);
    context.reserve(kTile * D * 4);
    if (s.keyless_last()) asked.reserve(static_cast<size_t>(s.H * s.C) * 4), weights.reserve(static_cast<size_t>(s.H) * keys * 4);
    if (s.relative > 0) {
        const size_t table = static_cast<size_t>(s.relative + kTile);
        relative_queries.reserve((keys + kTile) * table * 4);
        relative_keys.reserve(table * kTile * 4);
        skewed.reserve((keys + 2 * kTile) * kTile * 4);
    }
}

namespace {

// Queries [from, to) of one head of one pair; `pair` is an index into Group::pairs.
struct AttendTask {
    int pair, head, from, to;
};

// Some pairs of the batch, concatenated.
struct Group {
    std::vector<int> pairs, starts;  // starts[i]: first row of pairs[i]
    int tokens = 0;
    std::vector<AttendTask> attention;  // tasks of one layer; in a team's group largest first
};

// The activations of one group.
struct Memory {
    Buffer x, q, k, v, attention;     // (T, C)
    Buffer first_x, first_attention;  // (P, C), the last layer of a classifier
    Buffer ids, types, positions;     // (T,)
    int capacity = 0;

    Heads heads() const { return {q.as<void>(), k.as<void>(), v.as<void>(), capacity}; }
    void reserve(const Shape& s, const Group& g, size_t element) {
        capacity = std::max(capacity, g.tokens + kSlackRows);
        const size_t C = static_cast<size_t>(s.C), wide = static_cast<size_t>(capacity) * C, few = (g.pairs.size() + kSlackRows) * C;
        x.reserve(wide * 4);
        for (Buffer* b : {&q, &k, &v, &attention}) b->reserve(wide * element);
        first_x.reserve(few * 4);
        first_attention.reserve(few * element);
        for (Buffer* b : {&ids, &types, &positions}) b->reserve(static_cast<size_t>(capacity) * 4);
    }
};

void check(const Shape& s, const Batch& b) {
    const auto fail = [](const std::string& what, int64_t got, const std::string& where = "") {
        throw std::invalid_argument("expected " + what + ", got " + std::to_string(got) + where);
    };
    const std::string tokens = std::to_string(b.ids.size());
    if (b.types.size() != b.ids.size()) fail("as many type_ids as input_ids (" + tokens + ")", static_cast<int64_t>(b.types.size()));
    if (b.offsets.size() < 2) fail("cu_seqlens of at least one pair (2 numbers)", static_cast<int64_t>(b.offsets.size()));
    if (b.offsets[0] != 0) fail("cu_seqlens to begin with 0", b.offsets[0]);
    if (b.offsets.back() < 0 || static_cast<size_t>(b.offsets.back()) != b.ids.size())
        fail("cu_seqlens to end with the number of tokens (" + tokens + ")", b.offsets.back());
    const int limit = s.positions > 0 && s.repeat_from == 0 ? std::min(s.max_length, s.positions - s.position_offset) : s.max_length;
    const int types = s.has_cosine() ? 2 : s.types;  // type ids are ignored if there is one segment only
    for (int p = 0; p < b.pairs(); ++p) {
        const std::string where = " at pair " + std::to_string(p);
        const int from = b.offsets[p], to = b.offsets[p + 1];
        if (to <= from) fail("increasing cu_seqlens (no pair is empty)", to, " after " + std::to_string(from) + where);
        if (to > b.offsets.back()) fail("cu_seqlens of at most " + tokens, to, where);
        if (to - from > limit) fail("at most " + std::to_string(limit) + " tokens", to - from, where);
        bool seen[2] = {false, false};
        for (int t = from; t < to; ++t) {
            const int id = b.ids[t], type = b.types[t];
            if (id < 0 || id >= s.vocab) fail("input_ids from 0 to " + std::to_string(s.vocab - 1), id, " at token " + std::to_string(t));
            if (types > 1 && (type < 0 || type >= types)) fail("type_ids from 0 to " + std::to_string(types - 1), type, " at token " + std::to_string(t));
            seen[type != 0] = true;
        }
        if (s.has_cosine() && !(seen[0] && seen[1])) fail("tokens of type 0 and of type 1", seen[1], " alone" + where);
    }
}

// One call of Engine::logits(): its plan, and the phases of a group.
struct Call {
    const Weights& w;
    const Kernels& k;
    const Batch& batch;
    const int threads;
    float* const logits;
    std::vector<std::vector<float>>* const trace;
    const Shape& s = w.shape;
    const size_t C = static_cast<size_t>(s.C);

    // Short pairs are gathered into groups, each for one thread, so that their activations stay in its cache and no thread
    // waits for another. Long pairs of similar length go to one thread each if there is one for every thread. Other long
    // pairs, and groups that do not divide evenly among the threads, form `team`, a group that all threads process together.
    void plan(Group& team, std::vector<Group>& alone) const {
        const auto add = [&](Group& g, int p) { g.pairs.push_back(p), g.starts.push_back(g.tokens), g.tokens += batch.length(p); };
        std::vector<int> longs;
        for (int p = 0; p < batch.pairs(); ++p) {
            const int n = batch.length(p);
            if (trace || (threads > 1 && n > kAloneTokens)) {
                longs.push_back(p);
                continue;
            }
            if (alone.empty() || alone.back().tokens + n > std::max(kGroupTokens, n) || alone.back().tokens >= kGroupTokens) alone.emplace_back();
            add(alone.back(), p);
        }
        if (!trace) std::stable_sort(longs.begin(), longs.end(), [&](int p, int q) { return batch.length(p) > batch.length(q); });
        for (size_t i = 0; i < longs.size();) {
            const size_t end = i + static_cast<size_t>(threads);
            const int n = batch.length(longs[i]);
            const bool alike = !trace && end <= longs.size() && n - batch.length(longs[end - 1]) <= n / kLikeLength;
            if (alike) for (; i < end; ++i) add(alone.emplace_back(), longs[i]);
            else add(team, longs[i++]);
        }
        std::stable_sort(alone.begin(), alone.end(), [](const Group& a, const Group& b) { return a.tokens > b.tokens; });
        for (; threads > 1 && alone.size() % static_cast<size_t>(threads); alone.pop_back())
            for (const int p : alone.back().pairs) add(team, p);
        plan_attention(team, threads);
        for (Group& g : alone) plan_attention(g, 1);
    }

    // Tasks of one (pair, head) each, divided into ranges of queries if threads share the group.
    void plan_attention(Group& g, int sharing) const {
        const auto length = [&](int pair) { return batch.length(g.pairs[pair]); };
        const int share = round_up((g.tokens * s.H + 4 * sharing - 1) / (4 * sharing), kTile);
        for (int i = 0; i < static_cast<int>(g.pairs.size()); ++i) {
            const int n = length(i), step = sharing == 1 ? n : std::min(kQueriesPerTask, std::max(share, 4 * kTile));
            for (int h = 0; h < s.H; ++h)
                for (int from = 0; from < n; from += step) g.attention.push_back({i, h, from, std::min(n, from + step)});
        }
        if (sharing == 1) return;
        std::stable_sort(g.attention.begin(), g.attention.end(), [&](const AttendTask& a, const AttendTask& b) {
            const int n = length(a.pair), m = length(b.pair);
            return n != m ? n > m : w.slopes[a.head] < w.slopes[b.head];
        });
    }

    void gather(const Group& g, Memory& m) const {
        for (size_t i = 0; i < g.pairs.size(); ++i)
            for (int t = 0; t < batch.length(g.pairs[i]); ++t) {
                const int at = g.starts[i] + t, from = batch.offsets[g.pairs[i]] + t;
                m.ids.as<int32_t>()[at] = batch.ids[from], m.positions.as<int32_t>()[at] = s.row_of(t);
                m.types.as<int32_t>()[at] = s.types > 1 || s.has_cosine() ? batch.types[from] : 0;
            }
    }

    Relative relative(int l, size_t h) const {
        if (s.relative == 0) return {};
        const Layer& layer = w.layers[l];
        const size_t at = h * static_cast<size_t>(s.relative * s.D) * k.exchange_bytes;
        const float* longest = layer.relative_longest + 2 * h;
        return {layer.relative_keys + at, layer.relative_queries + at, longest[0], longest[1], w.relative_rows, s.relative};
    }

    // The job of one task in layer l. The pair's first output row is row `row` of `to`.
    AttendJob job(int l, const Group& g, const AttendTask& task, const Memory& m, const Buffer& to, size_t row) const {
        const size_t start = static_cast<size_t>(g.starts[task.pair]), h = static_cast<size_t>(task.head), D = static_cast<size_t>(s.D);
        const size_t at = (h * static_cast<size_t>(m.capacity) + start) * D * k.exchange_bytes, out = (row * C + h * D) * k.exchange_bytes;
        return {m.q.as<std::byte>() + at, m.k.as<std::byte>() + at, m.v.as<std::byte>() + at, to.as<std::byte>() + out,
                s.C, batch.length(g.pairs[task.pair]), task.from, task.to, s.D, s.alibi, w.slopes[h], w.layers[l].window, relative(l, h)};
    }

    // Divides `count` rows into blocks of similar size, a multiple of blocks for each thread. Blocks are whole tiles; with
    // few rows the smallest tile is the unit, because even division then saves more than full tiles.
    template <class Work>
    void each_block(Team& team, int count, int sharing, const Work& work) const {
        const int unit = count >= 32 * sharing * k.row_tile ? k.row_tile : k.lowest_tile, units = (count + unit - 1) / unit;
        const int blocks = std::min(units, round_up((count + k.block_rows - 1) / k.block_rows, sharing));
        team.phase(blocks, [&](int b) {
            const int from = units * b / blocks * unit, to = std::min(count, units * (b + 1) / blocks * unit);
            work(from, to - from);
        });
    }

    // Room for the trace, whose rows are all in one group: allocated here, because threads of a team must not throw.
    void prepare_trace(const Group& g) const {
        const size_t whole = static_cast<size_t>(s.whole_layers());
        trace->assign(whole + 1, std::vector<float>(static_cast<size_t>(g.tokens) * C));
        if (!s.cosine && !s.mean) trace->emplace_back(g.pairs.size() * C);
    }

    void note(Team& team, const Buffer& rows, int layer) const {
        if (trace) team.phase(1, [&](int) { std::copy_n(rows.as<float>(), (*trace)[layer].size(), (*trace)[layer].data()); });
    }

    // All layers of a group. Each of the `sharing` threads calls this.
    void run(const Group& g, Memory& m, Team& team, int sharing, Scratch& scratch) const {
        const int whole = s.whole_layers();
        const auto x = [&](int row) { return m.x.as<float>() + static_cast<size_t>(row) * C; };
        // Types of the rows from `row` on, for two-term int8 of query-token rows with the cosine heads (put_operands).
        const auto fine_types = [&](int row) { return s.cosine ? m.types.as<int32_t>() + row : nullptr; };
        const auto project = [&](int l, int from, int rows) {  // q, k and v of layer l
            if (l == s.L || (l == whole && s.keyless_last())) return;
            k.project_heads(s, w.layers[l], l < whole ? Columns::all : Columns::keys_and_values, x(from), fine_types(from),
                            m.positions.as<int32_t>() + from, rows, m.heads(), from, scratch);
        };
        each_block(team, g.tokens, sharing, [&](int from, int rows) {
            k.embed(w, m.ids.as<int32_t>() + from, m.types.as<int32_t>() + from, m.positions.as<int32_t>() + from, rows, x(from), scratch);
            project(0, from, rows);
        });
        note(team, m.x, 0);
        for (int l = 0; l < whole; ++l) {
            team.phase(static_cast<int>(g.attention.size()), [&](int i) {
                const AttendTask& task = g.attention[i];
                k.attend(job(l, g, task, m, m.attention, static_cast<size_t>(g.starts[task.pair])), scratch);
            });
            each_block(team, g.tokens, sharing, [&](int from, int rows) {
                const std::byte* attention = m.attention.as<std::byte>() + static_cast<size_t>(from) * C * k.exchange_bytes;
                k.finish_layer(s, w.layers[l], attention, x(from), fine_types(from), rows, scratch);
                project(l + 1, from, rows);
            });
            note(team, m.x, l + 1);
        }
        if (s.has_cosine()) score(g, m, team, scratch);
        if (!s.cosine) classify(g, m, team, scratch);
    }

    void score(const Group& g, Memory& m, Team& team, Scratch& scratch) const {
        team.phase(static_cast<int>(g.pairs.size()), [&](int i) {
            const int p = g.pairs[i], start = g.starts[i];
            logits[p] = k.cosine(w, m.x.as<float>() + static_cast<size_t>(start) * C, m.types.as<int32_t>() + start, batch.length(p), scratch);
        });
    }

    // The classifier head; if it reads first rows, also the last layer of those.
    void classify(const Group& g, Memory& m, Team& team, Scratch& scratch) const {
        const int pairs = static_cast<int>(g.pairs.size());
        const auto first_x = [&](int i) { return m.first_x.as<float>() + static_cast<size_t>(i) * C; };
        const auto attention = [&](int i) { return m.first_attention.as<std::byte>() + static_cast<size_t>(i) * C * k.exchange_bytes; };
        team.phase(pairs, [&](int i) {
            const float* x = m.x.as<float>() + static_cast<size_t>(g.starts[i]) * C;
            if (s.mean) return k.average(w, x, batch.length(g.pairs[i]), first_x(i), scratch);
            std::copy_n(x, C, first_x(i));
            if (s.keyless_last()) return k.attend_first(w, x, batch.length(g.pairs[i]), attention(i), scratch);
            k.project_heads(s, w.layers.back(), Columns::queries, x, nullptr, m.positions.as<int32_t>() + g.starts[i], 1, m.heads(), g.starts[i], scratch);
        });
        // A phase of its own: attend() loads a whole tile of queries, which may reach into the next pair's.
        if (!s.mean && !s.keyless_last())
            team.phase(pairs, [&](int i) {
                for (int h = 0; h < s.H; ++h) k.attend(job(s.L - 1, g, {i, h, 0, 1}, m, m.first_attention, static_cast<size_t>(i)), scratch);
            });
        team.phase((pairs + kTile - 1) / kTile, [&](int b) {
            const int from = b * kTile, count = std::min(kTile, pairs - from);
            float found[kTile];
            if (!s.mean) k.finish_layer(s, w.layers.back(), attention(from), first_x(from), nullptr, count, scratch);
            k.classify(w, first_x(from), count, found, scratch);
            for (int i = 0; i < count; ++i) logits[g.pairs[from + i]] = found[i] + (s.sum ? logits[g.pairs[from + i]] : 0.0f);
        });
        if (!s.mean) note(team, m.first_x, s.L);
    }
};

// A process that was forked from another has a number of its own. (Windows has no fork.)
long process_number() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

}  // namespace

struct Engine::State {
    Pool pool;
    std::vector<Scratch> scratch;  // one for each thread
    std::vector<Memory> memory;    // that of the team, then one for each thread
    long process = process_number();
};

Engine::Engine(const Weights& weights, const Kernels* kernels) : weights_(weights), kernels_(kernels) {}

Engine::~Engine() {
    // After a fork the pool's threads exist only in the parent; joining them in the child would never return.
    if (state_ && state_->process != process_number()) state_.release();
}

void Engine::logits(const Batch& batch, int threads, float* out, std::vector<std::vector<float>>* trace) {
    check(shape(), batch);
    if (threads < 1) throw std::invalid_argument("expected threads of at least 1, got " + std::to_string(threads));
    threads = std::min(threads, (batch.offsets.back() + kFewestRows - 1) / kFewestRows);
    std::unique_lock<std::mutex> lock(calls_);
    if (state_ && state_->process != process_number()) state_.release();  // see ~Engine
    if (!state_) state_ = std::make_unique<State>();
    State& state = *state_;

    const Call call{weights_, *kernels_, batch, threads, out, trace};
    Group together;
    std::vector<Group> alone;
    call.plan(together, alone);
    int longest = 0;
    for (int p = 0; p < batch.pairs(); ++p) longest = std::max(longest, batch.length(p));
    while (static_cast<int>(state.scratch.size()) < threads) state.scratch.emplace_back();
    while (static_cast<int>(state.memory.size()) < threads + 1) state.memory.emplace_back();
    try {
        for (int i = 0; i < threads; ++i) {
            state.scratch[i].reserve(shape(), kernels_->block_rows + kernels_->row_tile, longest);
            for (const Group& g : alone) state.memory[i + 1].reserve(shape(), g, kernels_->exchange_bytes);
        }
        if (together.tokens) state.memory[0].reserve(shape(), together, kernels_->exchange_bytes);
        if (trace) call.prepare_trace(together);
    } catch (const std::bad_alloc&) {
        state.memory.clear();  // else a smaller batch would ask again for the capacity that could not be had
        throw;
    }
    if (together.tokens) call.gather(together, state.memory[0]);

    Team::Shared shared;
    std::atomic<size_t> next{0};
    state.pool.run(threads, [&](int id) {
        const FloatMode mode;
        Team team(shared);
        kernels_->enter();
        Scratch& scratch = state.scratch[id];
        if (together.tokens) call.run(together, state.memory[0], team, threads, scratch);
        Memory& own = state.memory[id + 1];
        for (size_t g; (g = next.fetch_add(1)) < alone.size();) {
            Team::Shared own_phases;
            Team self(own_phases);
            call.gather(alone[g], own);
            call.run(alone[g], own, self, 1, scratch);
        }
        kernels_->leave();
    });
}

std::array<double, kParts> Engine::spent() {
    const std::lock_guard<std::mutex> lock(calls_);
    std::array<double, kParts> total{};
    if (!state_) return total;
    for (const Scratch& scratch : state_->scratch)
        for (size_t part = 0; part < kParts; ++part) total[part] += 1e-9 * static_cast<double>(scratch.spent[part]);
    return total;
}

}  // namespace turborank
